"""What a cache tells whoever counts. Knows keys and bytes, not metrics."""

from typing import Protocol


class CacheObserver(Protocol):
    """Hears what the cache does, to count it."""

    def lookup(self, hit: bool) -> None: ...
    def evicted(self, key: str, num_bytes: int) -> None: ...
    def failed(self, key: str, error: Exception) -> None: ...
    def resident(self, num_bytes: int) -> None: ...


class SilentObserver:
    """Counts nothing."""

    def lookup(self, hit: bool) -> None:
        pass

    def evicted(self, key: str, num_bytes: int) -> None:
        pass

    def failed(self, key: str, error: Exception) -> None:
        pass

    def resident(self, num_bytes: int) -> None:
        pass
