"""A hold on resident values. Knows who must hear of its end, not what the values are."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class Lease(Generic[V]):
    """Values that stay resident until release."""

    def __init__(
        self, values: Sequence[V], *, cold: frozenset[str], load_seconds: float, give_back: Callable[[], None]
    ) -> None:
        self.cold = cold  # keys that were not resident when the bytes were granted
        self.load_seconds = load_seconds  # from that instant until the last of them was
        self._values: tuple[V, ...] | None = tuple(values)
        self._give_back = give_back

    @property
    def values(self) -> tuple[V, ...]:
        """In wanted order. Not to be asked for, nor used, after release."""
        assert self._values is not None, "the lease was released"
        return self._values

    def release(self) -> None:
        """Ends the hold. Idempotent, from any thread."""
        # Forgotten, so that a lease that lies about keeps no evicted value alive.
        self._values = None
        self._give_back()


def release_when_granted(future: Future[Lease[V]]) -> None:
    """Gives up a lease that was asked for, whether it is granted by now or not.

    Whoever stops waiting must call this and not `future.cancel()` alone, which does nothing once the lease is granted.
    """
    if not future.cancel():
        future.add_done_callback(_release)


def _release(future: Future[Lease[V]]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
