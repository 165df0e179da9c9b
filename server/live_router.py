"""A router with what the server must know of its file, and whether the store has moved on since. Knows no requests."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.policy import RoutingPolicy
from router.router import Route, Router
from server.ports import RouterPort
from stack_store.manifest import DomainEntry, Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LiveRouter:
    """A RouterPort."""

    router: Router
    stack_digests: Mapping[str, tuple[str, ...]]

    @property
    def max_tokens(self) -> int:
        return self.router.settings.max_tokens

    @property
    def policy(self) -> RoutingPolicy:
        return self.router.policy

    def route(self, text: str) -> Route:
        return self.router.route(text)


def stale_domains(router: RouterPort, registered: Sequence[DomainEntry]) -> list[str]:
    """The domains that the router knows by other stacks than those registered now, so that its scores may be off."""
    trained = router.stack_digests
    return [
        entry.name
        for entry in registered
        if entry.name in trained and trained[entry.name] != tuple(stack.digest for stack in entry.stacks)
    ]


class RouterFit:
    """How the live router fits the store as it is; worked out anew only when one of the two has changed."""

    def __init__(self) -> None:
        self._of: tuple[RouterPort | None, Manifest] | None = None
        self._stale: tuple[str, ...] = ()

    def stale(self, router: RouterPort | None, manifest: Manifest) -> tuple[str, ...]:
        """As `stale_domains`."""
        if self._of is None or self._of[0] is not router or self._of[1] is not manifest:
            self._stale = () if router is None else tuple(stale_domains(router, manifest.domains))
            self._of = router, manifest
        return self._stale


def knowledge_of(router: RouterPort | None, entry: DomainEntry) -> str | None:
    """Whether the router was `trained` on this version, on other stacks (`stale`), or does not know the domain."""
    if router is None:
        return None
    if entry.name not in router.stack_digests:
        return "unknown"
    return "stale" if stale_domains(router, [entry]) else "trained"


def warn_of_stale_domains(router: RouterPort | None, registered: Sequence[DomainEntry]) -> None:
    """One line that names them, if there are any."""
    if router is not None and (stale := stale_domains(router, registered)):
        logger.warning("router was trained against other stacks than are registered domains=%s", stale)
