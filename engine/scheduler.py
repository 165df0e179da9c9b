"""Decides which sequences run in the next step. Knows token counts and cache spans, not tensors.

Oldest first: a sequence that waits for cache room is never overtaken, so none starves. Running sequences always get
their next token; what is left of a step's token budget goes to prompts, the oldest first, in chunks.
"""

from collections import deque
from dataclasses import dataclass

from engine.kv_cache import KvCache
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """The next `num_tokens` of a sequence. When none are left after them, the row is sampled."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether these tokens are the sequence's last known ones."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Waiting and running sequences, and the room they hold."""

    def __init__(self, kv_cache: KvCache, *, max_rows: int, max_step_tokens: int) -> None:
        self.kv_cache = kv_cache
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever it is doing, and frees its span: the one place where that happens."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.span is not None:
            self.kv_cache.release(sequence.span)
            sequence.span = None

    def schedule(self) -> list[ScheduledRow]:
        """The rows of the next step; empty if there is nothing to do."""
        self._admit()
        rows = [ScheduledRow(sequence, 1) for sequence in self.running if sequence.num_pending == 1]
        budget = self.max_step_tokens - len(rows)
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                rows.append(ScheduledRow(sequence, min(sequence.num_pending, budget)))
                budget -= rows[-1].num_tokens
        return rows

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_rows:
            span = self.kv_cache.reserve(self.waiting[0].num_positions)
            if span is None:
                return
            sequence = self.waiting.popleft()
            sequence.span = span
            self.running.append(sequence)

    def check_integrity(self) -> None:
        """Asserts that the cache holds exactly the spans of the running sequences."""
        self.kv_cache.check_integrity()
        held = sum(sequence.span.length for sequence in self.running if sequence.span is not None)
        assert held == round(self.kv_cache.used_ratio * self.kv_cache.num_positions), held
