"""Asks for a key before anything of a request is read, and counts who asks. Knows keys and limits, not routes.

The check is part of the route class, so that it runs before the body is parsed and no route can be added without it.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.app_state import service_of
from server.boundary import record_of
from server.errors import AdminDisabled, InvalidKey, RateLimitExceeded
from server.rate_limits import RateLimits

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Guard = Callable[[Request], None]

COUNTED_METHODS = frozenset({"POST"})  # what costs the server work; lists of models do not
IPV6_SITE_BITS = 64  # one subscriber has at least so many addresses to choose from


class Keys:
    """The keys that open the two doors."""

    def __init__(self, *, api_keys: Sequence[str], admin_key: str | None) -> None:
        self._api_digests = tuple(_digest(key.encode()) for key in api_keys)
        self._admin_digest = None if admin_key is None else _digest(admin_key.encode())

    def require_api_key(self, request: Request) -> None:
        """Without configured keys everyone may come in."""
        if self._api_digests and not _is_any_of(_bearer(request), self._api_digests):
            raise InvalidKey("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")

    def require_admin_key(self, request: Request) -> None:
        """Without a configured key nobody may."""
        if self._admin_digest is None:
            raise AdminDisabled("the admin API is off: set server.admin_key to turn it on")
        if not _is_any_of(_bearer(request), (self._admin_digest,)):
            raise InvalidKey("the admin key is missing or wrong; send it as `Authorization: Bearer KEY`")

    def client_of(self, request: Request) -> str:
        """Who asks, of those who may: the key's digest, or the address where no keys are set."""
        key = _bearer(request)
        if self._api_digests and key is not None:
            return _digest(key).hex()
        return _site(request.client.host if request.client else "")


def keys_of(request: Request) -> Keys:
    """The keys of the app that the request came to."""
    keys = request.app.state.keys
    assert isinstance(keys, Keys)
    return keys


def rate_limits_of(request: Request) -> RateLimits:
    """The limits of the app that the request came to."""
    rate_limits = request.app.state.rate_limits
    assert isinstance(rate_limits, RateLimits)
    return rate_limits


class ApiRoute(APIRoute):
    """A route that asks for an API key and is counted for it."""

    def get_route_handler(self) -> Handler:
        return _guarded(super().get_route_handler(), _admit)


class AdminRoute(APIRoute):
    """A route that asks for the admin key."""

    def get_route_handler(self) -> Handler:
        return _guarded(super().get_route_handler(), lambda request: keys_of(request).require_admin_key(request))


def _admit(request: Request) -> None:
    """InvalidKey, or RateLimitExceeded. What is left is told by the answer; the tokens are taken when it has ended."""
    keys, limits, record = keys_of(request), rate_limits_of(request), record_of(request)
    keys.require_api_key(request)
    if not limits.is_on or request.method not in COUNTED_METHODS:
        return
    client = keys.client_of(request)
    try:
        limits.admit(client)
    except RateLimitExceeded as error:
        service_of(request).metrics.rate_limited.labels(error.limit).inc()
        raise
    finally:
        record.headers.update(limits.headers(client))
    record.charge = lambda num_tokens: limits.charge(client, num_tokens)


def _guarded(handler: Callable[[Request], Awaitable[Response]], guard: Guard) -> Handler:
    async def handle(request: Request) -> Response:
        guard(request)
        return await handler(request)

    return handle


def _bearer(request: Request) -> bytes | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    # Headers were decoded as latin-1: these are the bytes that came.
    return key.strip(" \t").encode("latin-1") or None if scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_any_of(given: bytes | None, digests: Sequence[bytes]) -> bool:
    """In a time that tells nothing about the keys: every one is compared, each as a digest in constant time."""
    if given is None:
        return False
    digest = _digest(given)
    matches = [hmac.compare_digest(digest, key) for key in digests]
    return any(matches)


def _site(host: str) -> str:
    """An IPv4 address, or the network of an IPv6 address, whose owner has them all."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address.packed, IPV6_SITE_BITS), strict=False))
