"""Asks for a key before anything of a request is read. Knows the configured keys; not what a route does.

The check is part of the route class, so that it runs before the body is parsed and no route can be added without it.
"""

import hmac
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.errors import AdminDisabled, InvalidKey

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Guard = Callable[[Request], None]


class Keys:
    """The keys that open the two doors."""

    def __init__(self, *, api_keys: Sequence[str], admin_key: str | None) -> None:
        self._api_keys = tuple(api_keys)
        self._admin_key = admin_key

    def require_api_key(self, request: Request) -> None:
        """Without configured keys everyone may come in."""
        if self._api_keys and not _is_any_of(_bearer(request), self._api_keys):
            raise InvalidKey("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")

    def require_admin_key(self, request: Request) -> None:
        """Without a configured key nobody may."""
        if self._admin_key is None:
            raise AdminDisabled("the admin API is off: set server.admin_key to turn it on")
        if not _is_any_of(_bearer(request), (self._admin_key,)):
            raise InvalidKey("the admin key is missing or wrong; send it as `Authorization: Bearer KEY`")


def keys_of(request: Request) -> Keys:
    """The keys of the app that the request came to."""
    keys = request.app.state.keys
    assert isinstance(keys, Keys)
    return keys


class ApiRoute(APIRoute):
    """A route that asks for an API key."""

    def get_route_handler(self) -> Handler:
        return _guarded(super().get_route_handler(), lambda request: keys_of(request).require_api_key(request))


class AdminRoute(APIRoute):
    """A route that asks for the admin key."""

    def get_route_handler(self) -> Handler:
        return _guarded(super().get_route_handler(), lambda request: keys_of(request).require_admin_key(request))


def _guarded(handler: Callable[[Request], Awaitable[Response]], guard: Guard) -> Handler:
    async def handle(request: Request) -> Response:
        guard(request)
        return await handler(request)

    return handle


def _bearer(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _is_any_of(given: str | None, keys: Sequence[str]) -> bool:
    """In a time that tells nothing about the keys: every one is compared, each in constant time."""
    if given is None:
        return False
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return any(matches)
