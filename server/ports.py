"""What the server needs of the engine and of a router, as protocols. Knows their words, not how they work."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol, TypeVar

from engine.types import EngineSnapshot, Event, GenerationRequest
from router.policy import RoutingPolicy
from router.router import Route

T = TypeVar("T")


class EnginePort(Protocol):
    """The one thread that owns the device, seen from outside."""

    @property
    def max_model_len(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None], /) -> None: ...

    def cancel(self, request_id: str, /) -> None: ...

    def heartbeat_age_seconds(self) -> float: ...

    def snapshot(self) -> EngineSnapshot: ...


class Submit(Protocol):
    """Runs work in some other thread."""

    def __call__(self, work: Callable[[], T], /) -> Future[T]: ...


class RouterPort(Protocol):
    """Scores one text. Blocks until the base has read it."""

    @property
    def max_tokens(self) -> int:
        """How much of a text is read."""
        ...

    @property
    def stack_digests(self) -> Mapping[str, tuple[str, ...]]:
        """The rounds of each domain that the router was trained against."""
        ...

    @property
    def policy(self) -> RoutingPolicy:
        """What turns its scores into a mix."""
        ...

    def route(self, text: str) -> Route: ...
