"""Routes a text once and remembers the route. Knows the active router, not what the mix is used for.

Lives on the event loop; the router itself runs in threads of its own and waits there for the base to read the text.
Texts are remembered by their digest, so no prompt stays in memory.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from router.router import Route
from server.errors import RouterNotFound
from server.ports import RouterPort, Submit

logger = logging.getLogger(__name__)

CACHED_ROUTES = 4096
# A router reads only the first tokens of a text, but encoding takes as long as the text is.
# Ordinary text has about 4 characters a token, so that a text cut here still has every token that is read.
MAX_CHARACTERS_PER_TOKEN = 64

LoadRouter = Callable[[Path], RouterPort]

NO_ROUTE = Route(scores={}, mix={}, gap=False)


@dataclass(slots=True)
class _Remembered:
    """A route, and whether somebody was told already that it is a gap."""

    route: Route
    gap_told: bool = False


class Routing:
    """The router that is live, and the routes that it made."""

    def __init__(self, submit: Submit, *, load_router: LoadRouter, router: RouterPort | None) -> None:
        """`submit` runs a router."""
        self._submit = submit
        self._load_router = load_router
        self._router = router
        self._routes: LRUCache[bytes, _Remembered] = LRUCache(CACHED_ROUTES)

    @property
    def router(self) -> RouterPort | None:
        """The one that is live."""
        return self._router

    @property
    def is_available(self) -> bool:
        """Whether a router is live."""
        return self._router is not None

    async def route(self, text: str) -> Route:
        """Scores and mix of a text; a text without words, like one without a router, has no scores. Cancellable."""
        if self._router is None:
            return NO_ROUTE
        router, text = self._router, _readable(self._router, text)
        if not text.strip():
            return NO_ROUTE
        digest = _digest(text)
        if (known := self._routes.get(digest)) is not None:
            return known.route
        route = await asyncio.wrap_future(self._submit(lambda: router.route(text)))
        if router is self._router:  # a router that was swapped meanwhile must not be remembered as the new one
            self._routes[digest] = _Remembered(route)
        return route

    def remembered_mix(self, text: str | None) -> Mapping[str, float]:
        """The mix of a text that was routed before and is remembered, else none."""
        if self._router is None or text is None:
            return {}
        known = self._routes.get(_digest(_readable(self._router, text)))
        return {} if known is None else known.route.mix

    def first_gap(self, text: str) -> str | None:
        """Of a text whose route is a gap, what the router could read; None if it was told before and is remembered."""
        if self._router is None:
            return None
        text = _readable(self._router, text)
        known = self._routes.get(_digest(text))
        if known is None:
            return text
        is_first, known.gap_told = not known.gap_told, True
        return text if is_first else None

    async def route_strictly(self, text: str) -> Route:
        """As `route`, but the lack of a router is an error."""
        if self._router is None:
            raise RouterNotFound("this store has no router")
        return await self.route(text)

    def load(self, path: Path) -> RouterPort:
        """A router that is ready to go live; blocks on the file. Raises what is wrong with it."""
        return self._load_router(path)

    def swap(self, router: RouterPort) -> None:
        """The next route is made by this router."""
        self._router = router
        self._routes.clear()
        logger.info("router swapped")


def _readable(router: RouterPort, text: str) -> str:
    return text[: router.max_tokens * MAX_CHARACTERS_PER_TOKEN]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
