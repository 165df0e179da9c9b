"""Decides which sequences run in the next step. Knows token counts and cache spans, not tensors.

Oldest first: a sequence that waits for cache room is never overtaken, so none starves. Running sequences always get
their next token; what is left of a step's token budget goes to prompts, the oldest first, in chunks. Beside sequences
that decode, prompts may have a smaller budget, which bounds how long a stream waits for its next token.
"""

from collections import deque
from dataclasses import dataclass

from engine.kv_cache import KvCache
from engine.prefix_cache import MixKey, PrefixCache
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


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """The first `num_tokens` positions from `source` on are to be copied to those from `target` on."""

    source: int
    target: int
    num_tokens: int


class Scheduler:
    """Waiting and running sequences, and the room they hold."""

    def __init__(
        self, kv_cache: KvCache, *, max_rows: int, max_step_tokens: int, prompt_tokens_beside_decode: int | None = None
    ) -> None:
        self.kv_cache = kv_cache
        self.prefixes = PrefixCache(kv_cache)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.prompt_tokens_beside_decode = prompt_tokens_beside_decode
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._copies: list[PrefixCopy] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Takes a sequence out, whatever it is doing, and frees its span: the one place where that happens.

        With `keep`, what it computed stays for sequences that begin alike, as long as nobody needs the room.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.span is not None:
            computed = sequence.token_ids[: sequence.num_computed] if keep else []
            self.prefixes.keep(_mix_key(sequence), computed, sequence.span)
            sequence.span = None

    def schedule(self) -> list[ScheduledRow]:
        """The rows of the next step; empty if there is nothing to do."""
        self._admit()
        rows = [ScheduledRow(sequence, 1) for sequence in self.running if sequence.num_pending == 1]
        budget = self.max_step_tokens - len(rows)
        if rows and self.prompt_tokens_beside_decode is not None:
            budget = min(budget, self.prompt_tokens_beside_decode)
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                rows.append(ScheduledRow(sequence, min(sequence.num_pending, budget)))
                budget -= rows[-1].num_tokens
        return rows

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_rows:
            span = self.prefixes.reserve(self.waiting[0].num_positions)
            if span is None:
                return
            sequence = self.waiting.popleft()
            sequence.span = span
            self.running.append(sequence)
            # Prompt logprobs need the hidden states of every token.
            if sequence.request.sampling.prompt_logprobs is None:
                reuse = self.prefixes.find(_mix_key(sequence), sequence.request.prompt_ids)
                if reuse is not None:
                    self._copies.append(PrefixCopy(reuse.source, span.start, reuse.num_tokens))
                    sequence.num_computed = sequence.num_reused = reuse.num_tokens

    def take_copies(self) -> list[PrefixCopy]:
        """What is to be copied before the latest rows run, in this order: a source may be a later copy's target."""
        copies, self._copies = self._copies, []
        return copies

    @property
    def used_ratio(self) -> float:
        """Share of the cache's positions that sequences hold, without what is only kept."""
        return (self.kv_cache.num_held - self.prefixes.num_positions) / self.kv_cache.num_positions

    def check_integrity(self) -> None:
        """Asserts that the cache holds exactly the spans of the running sequences and what is kept."""
        self.kv_cache.check_integrity()
        held = sum(sequence.span.length for sequence in self.running if sequence.span is not None)
        assert held + self.prefixes.num_positions == self.kv_cache.num_held, held


def _mix_key(sequence: Sequence) -> MixKey:
    return tuple(sorted((domain.name, domain.version, weight) for domain, weight in sequence.request.mix))
