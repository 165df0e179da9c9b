"""Decides which sequences run in the next step. Knows token counts and cache blocks, not tensors.

Oldest first: a sequence that waits for cache room is never overtaken, but for texts that are only read. These are
short, somebody waits for them who cannot start before, and they come first; but few are read at a time, and half of a
step's token budget is the prompts', so that none starves. Running sequences always get their next token; what is left
of the budget goes to prompts, the oldest first, in chunks. Beside sequences that decode, prompts may have a smaller
budget, which bounds how long a stream waits for its next token.

A sequence starts once there are blocks for all tokens that it has, and takes more as it grows. When none are left, the
youngest gives its blocks up and waits to be computed again, before all others that wait. The oldest always goes on, so
every sequence ends.
"""

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from engine.block_table import BLOCK_TOKENS, BlockTable, num_blocks_for
from engine.kv_cache import KvCache
from engine.sequence import Sequence

MAX_READS = 4  # texts that are read at a time


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """The next `num_tokens` of a sequence. When none are left after them, the row is sampled."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether these tokens are the last known ones of a sequence that goes on."""
        return self.num_tokens == self.sequence.num_pending and not self.sequence.is_read_only


class Scheduler:
    """Waiting and running sequences, and the blocks they hold; both oldest first."""

    def __init__(
        self, kv_cache: KvCache, *, max_rows: int, max_step_tokens: int, prompt_tokens_beside_decode: int | None = None
    ) -> None:
        self.kv_cache = kv_cache
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.prompt_tokens_beside_decode = prompt_tokens_beside_decode
        self._reads: deque[Sequence] = deque()
        self._prompts: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0  # how often a sequence gave its blocks up

    @property
    def waiting(self) -> list[Sequence]:
        """Those that have no blocks, in the order in which they come in while there is room for all kinds."""
        return [*self._reads, *self._prompts]

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of its queue."""
        self._queue_of(sequence).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever it is doing, and lets go of its blocks: the one place where that happens."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._queue_of(sequence):
            self._queue_of(sequence).remove(sequence)
        self.kv_cache.release(sequence.table.blocks)
        sequence.start_over()

    def schedule(self) -> list[ScheduledRow]:
        """The rows of the next step; empty if there is nothing to do."""
        self._grow()
        self._admit()
        rows = [ScheduledRow(sequence, 1) for sequence in self.running if sequence.is_at_its_end]
        budget = self.max_step_tokens - len(rows)
        if rows and self.prompt_tokens_beside_decode is not None:
            # A step of many rows takes as long again only with as many more tokens.
            budget = min(budget, max(self.prompt_tokens_beside_decode, len(rows)))
        pending = [sequence for sequence in self.running if not sequence.is_at_its_end]
        reads = [sequence for sequence in pending if sequence.is_read_only]
        prompts = [sequence for sequence in pending if not sequence.is_read_only]
        read_rows = _chunks(reads, (budget + 1) // 2 if prompts else budget)
        return rows + read_rows + _chunks(prompts, budget - sum(row.num_tokens for row in read_rows))

    def advance(self, row: ScheduledRow) -> None:
        """The row's tokens were computed; blocks that they filled can be shared from now on."""
        sequence = row.sequence
        num_full_before = sequence.num_computed // BLOCK_TOKENS
        sequence.num_computed += row.num_tokens
        num_full = sequence.num_computed // BLOCK_TOKENS
        if num_full > num_full_before and not sequence.is_read_only:
            keys = sequence.keys(num_full)
            for number in range(num_full_before, num_full):
                self.kv_cache.name(sequence.table.blocks[number], keys[number])

    @property
    def used_ratio(self) -> float:
        """Share of the cache's blocks that sequences hold, without what is only kept."""
        return 1.0 - self.kv_cache.num_free / self.kv_cache.num_blocks

    def check_integrity(self) -> None:
        """Asserts that the cache's blocks are held by the running sequences and by nobody else."""
        assert not any(sequence.table.blocks for sequence in self.waiting)
        self.kv_cache.check_integrity([sequence.table.blocks for sequence in self.running])

    def _grow(self) -> None:
        """Gives every running sequence room for its next token, the oldest first."""
        for sequence in list(self.running):
            while sequence in self.running and len(sequence.token_ids) > sequence.table.num_positions:
                block = self.kv_cache.take_behind(sequence.table.blocks[-1])
                if block is None:
                    self._preempt(self.running[-1])
                else:
                    sequence.table.extend([block])

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to wait. It keeps its tokens and computes them again, so it goes on exactly."""
        self.remove(sequence)
        self._queue_of(sequence).appendleft(sequence)
        self.num_preempted += 1

    def _admit(self) -> None:
        for queue, most in ((self._reads, MAX_READS), (self._prompts, self.max_rows)):
            num_running = sum(self._queue_of(sequence) is queue for sequence in self.running)
            while queue and num_running < most and self._start(queue[0]):
                self.running.append(queue.popleft())
                num_running += 1

    def _start(self, sequence: Sequence) -> bool:
        """Takes blocks for all tokens that it has, unless there are too few."""
        known = self._find_known(sequence)
        num_new = num_blocks_for(len(sequence.token_ids)) - len(known)
        # Each of those that run can grow by one more block before somebody has to give way.
        blocks = self.kv_cache.take(known, num_new, spare=len(self.running))
        if blocks is not None:
            sequence.start(BlockTable.of(blocks), len(known) * BLOCK_TOKENS)
        return blocks is not None

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self._reads if sequence.is_read_only else self._prompts

    def _find_known(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of a sequence. At least one token is left to compute: it is sampled from."""
        if sequence.states_layer is not None:
            return []
        return self.kv_cache.find(sequence.keys((len(sequence.token_ids) - 1) // BLOCK_TOKENS))


def _chunks(sequences: Rows[Sequence], budget: int) -> list[ScheduledRow]:
    """The next tokens of each, in order, as far as the budget goes."""
    rows = []
    for sequence in sequences:
        if budget <= 0:
            break
        rows.append(ScheduledRow(sequence, min(sequence.num_pending, budget)))
        budget -= rows[-1].num_tokens
    return rows
