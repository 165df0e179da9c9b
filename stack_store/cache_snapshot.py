"""A cache as it looks at one instant, for people and tests. Knows nothing but numbers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CacheEntrySnapshot:
    """One resident. Its pin is not among its leases."""

    key: str
    bytes: int
    state: Literal["resident", "loading"]
    leases: int
    pinned: bool
    last_used: float


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """A cache at one instant. What loads counts as resident: its bytes are claimed."""

    budget_bytes: int
    resident_bytes: int
    leased_bytes: int
    pinned_bytes: int
    entries: tuple[CacheEntrySnapshot, ...]
    waiting: int
