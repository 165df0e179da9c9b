"""Which values occupy the budget, and which of them may go. Knows bytes, not threads, loads or who waits.

A resident claims its bytes from the moment it is held, while its value still loads. Once loaded it is either held (a
lease needs it) or idle; only idle residents are evicted, least recently used first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import LRUCache

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Want:
    """A key that a lease needs, and the bytes that its value occupies."""

    key: str
    bytes: int

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise ValueError(f"want {self.key!r} has {self.bytes} bytes, must be at least 1")


@dataclass(slots=True, eq=False)
class Resident(Generic[V]):
    """One key's claim on the budget."""

    key: str
    bytes: int
    last_used: float
    holds: int = 0
    loaded: tuple[V] | None = None  # None while it loads; a tuple, because None may be a value

    @property
    def value(self) -> V:
        assert self.loaded is not None, f"{self.key} is still loading"
        return self.loaded[0]


class Residents(Generic[V]):
    """Claims that never exceed the budget. For one thread at a time."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        unload: Callable[[V], None],
        evicted: Callable[[str, int], None],
        clock: Callable[[], float],
    ) -> None:
        self.budget_bytes = budget_bytes
        self.by_key: dict[str, Resident[V]] = {}
        self.claimed_bytes = 0
        self._unload = unload
        self._evicted = evicted
        self._clock = clock
        self._idle: LRUCache[str, Resident[V]] = LRUCache(budget_bytes, getsizeof=lambda resident: resident.bytes)

    def is_loaded(self, key: str) -> bool:
        return key in self.by_key and self.by_key[key].loaded is not None

    def has_room(self, wants: Sequence[Want]) -> bool:
        """Whether hold(wants) can succeed now, evicting what is idle and not wanted."""
        missing = sum(want.bytes for want in wants if want.key not in self.by_key)
        idle_and_wanted = sum(self._idle[want.key].bytes for want in wants if want.key in self._idle)
        evictable = self._idle.currsize - idle_and_wanted
        return self.claimed_bytes - evictable + missing <= self.budget_bytes

    def hold(self, wants: Sequence[Want]) -> list[str]:
        """Keeps every wanted resident, claiming bytes for those that are missing, whose keys it returns to be loaded.

        Requires has_room(wants).
        """
        for want in wants:
            if want.key in self.by_key:
                self.by_key[want.key].holds += 1
                self._idle.pop(want.key, None)
        missing = [want for want in wants if want.key not in self.by_key]
        self._evict_for(sum(want.bytes for want in missing))
        for want in missing:
            self.by_key[want.key] = Resident(want.key, want.bytes, last_used=self._clock(), holds=1)
            self.claimed_bytes += want.bytes
        return [want.key for want in missing]

    def unhold(self, wants: Sequence[Want]) -> None:
        """Undoes one hold. What nobody holds any more becomes idle, as the most recently used."""
        for want in wants:
            resident = self.by_key[want.key]
            resident.holds -= 1
            resident.last_used = self._clock()
            self._settle(resident)

    def finish(self, key: str, value: V) -> None:
        """The value of a claimed key is loaded."""
        resident = self.by_key[key]
        resident.loaded = (value,)
        self._settle(resident)

    def drop(self, key: str) -> int:
        """Ends the claim of a key that nobody holds, and gives its value to `unload`. Returns the bytes."""
        self._idle.pop(key, None)
        resident = self.by_key.pop(key)
        self.claimed_bytes -= resident.bytes
        assert resident.holds == 0, f"{key} has {resident.holds} holds"
        if resident.loaded is not None:
            self._unload(resident.value)
        return resident.bytes

    def idle_keys(self) -> list[str]:
        return list(self._idle)

    def check_integrity(self) -> None:
        claimed = sum(resident.bytes for resident in self.by_key.values())
        assert claimed <= self.budget_bytes, f"{claimed} of {self.budget_bytes} bytes are claimed"
        assert claimed == self.claimed_bytes, f"{claimed} bytes are claimed, {self.claimed_bytes} are counted"
        idle = {key for key, resident in self.by_key.items() if resident.loaded is not None and resident.holds == 0}
        assert set(self._idle) == idle, f"idle are {idle}, listed as idle {set(self._idle)}"
        idle_bytes = sum(self.by_key[key].bytes for key in idle)
        assert self._idle.currsize == idle_bytes, f"{idle_bytes} bytes are idle, {self._idle.currsize} listed as idle"

    def _settle(self, resident: Resident[V]) -> None:
        if resident.loaded is not None and resident.holds == 0:
            self._idle[resident.key] = resident

    def _evict_for(self, num_bytes: int) -> None:
        while self.claimed_bytes + num_bytes > self.budget_bytes:
            key, resident = self._idle.popitem()
            self.drop(key)
            self._evicted(key, resident.bytes)
