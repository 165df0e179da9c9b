"""Decides where each sequence's keys and values lie. Knows positions, not tensors; the runner owns the memory.

A sequence holds one contiguous span, long enough for its prompt and all tokens that it may still produce, so
attention reads views of exact length and a running sequence never runs out of room.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvSpan:
    """Positions `start` to `start + length` of the cache."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first position behind the span."""
        return self.start + self.length


class KvCache:
    """Hands out spans of a fixed number of positions, first fit."""

    def __init__(self, num_positions: int) -> None:
        if num_positions < 1:
            raise ValueError(f"num_positions must be positive, got {num_positions}")
        self.num_positions = num_positions
        self._held: list[KvSpan] = []  # by start

    def reserve(self, length: int) -> KvSpan | None:
        """A free span of `length` positions, or None while there is none."""
        start = 0
        for index, span in enumerate([*self._held, KvSpan(self.num_positions, 0)]):
            if span.start - start >= length:
                reserved = KvSpan(start, length)
                self._held.insert(index, reserved)
                return reserved
            start = span.end
        return None

    def release(self, span: KvSpan) -> None:
        """Gives a span back. Releasing a span that is not held is an error of ours."""
        self._held.remove(span)

    def shrink(self, span: KvSpan, length: int) -> KvSpan:
        """Gives back all of a held span but its first `length` positions; the span that is left."""
        assert 0 < length <= span.length, (span, length)
        left = KvSpan(span.start, length)
        self._held[self._held.index(span)] = left
        return left

    @property
    def num_held(self) -> int:
        """Positions that are reserved."""
        return sum(span.length for span in self._held)

    def check_integrity(self) -> None:
        """Asserts that held spans are in range and do not overlap."""
        ends = [0, *(span.end for span in self._held)]
        starts = [*(span.start for span in self._held), self.num_positions]
        assert all(end <= start for end, start in zip(ends, starts, strict=True)), self._held
