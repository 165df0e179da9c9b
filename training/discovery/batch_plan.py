"""Groups rows into batches that cost little: of like length, with few domains each. Knows lengths and names only.

A batch costs what one pass costs whatever it holds, and each of its tokens with padding, the more the more domains the
batch needs: every row pays for all of them. Costs are in tokens of the base alone, about as measured with one thread
of a CPU in bfloat16 on the embedded base with two rounds of rank 2 a domain; they need not be exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

DomainName = str

PASS_COST = 40.0  # of a pass, in tokens
DOMAIN_COST = 0.14  # of a domain, in every token of the batch
MOST_JOINED = 250  # batches, the smallest: each is compared with all others


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row costs: its tokens, and the domains whose deltas it needs."""

    length: int
    domains: frozenset[DomainName]


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Rows by their indices, the longest of them, and the domains that any of them needs."""

    rows: tuple[int, ...]
    longest: int
    domains: frozenset[DomainName]

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding."""
        return self.longest * len(self.rows)

    @property
    def cost(self) -> float:
        """In tokens of the base alone."""
        return PASS_COST + self.padded_tokens * (1 + DOMAIN_COST * len(self.domains))


def plan_batches(shapes: Sequence[RowShape], *, max_tokens: int) -> list[list[int]]:
    """The rows' indices, each once, in batches of at most `max_tokens` with padding, or of one row.

    Rows that need the same domains are cut into batches at least cost; then batches of different domains that cost
    less together are joined, the smallest first. The same shapes in the same order give the same batches.
    """
    of_set: dict[tuple[DomainName, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        of_set.setdefault(tuple(sorted(shape.domains)), []).append(index)
    batches = [batch for key in sorted(of_set) for batch in cut_by_length(shapes, of_set[key], max_tokens=max_tokens)]
    return [list(batch.rows) for batch in _join(batches, max_tokens)]


def cut_by_length(shapes: Sequence[RowShape], rows: Sequence[int], *, max_tokens: int) -> list[PlannedBatch]:
    """These rows, which need the same domains, in the batches that cost least of all of like length."""
    order = sorted(rows, key=lambda row: -shapes[row].length)  # so the first of a batch is the longest
    best: list[tuple[float, tuple[PlannedBatch, ...]]] = [(0.0, ())]  # of the first 0, 1, 2... rows
    for end in range(1, len(order) + 1):
        ends = []
        for start in range(end - 1, -1, -1):
            batch = _batch(shapes, order[start:end])
            if len(batch.rows) > 1 and batch.padded_tokens > max_tokens:
                break
            ends.append((best[start][0] + batch.cost, start, batch))
        cost, start, batch = min(ends, key=lambda option: option[0])
        best.append((cost, (*best[start][1], batch)))
    return list(best[-1][1])


def _join(batches: Sequence[PlannedBatch], max_tokens: int) -> list[PlannedBatch]:
    """Joins a batch to the one with which it saves most, if it saves, the smallest first."""
    ordered = sorted(batches, key=lambda batch: batch.padded_tokens)
    waiting, done = ordered[:MOST_JOINED][::-1], ordered[MOST_JOINED:]
    while waiting:
        batch = waiting.pop()
        joined = [_together(batch, other) for other in waiting]
        savings = [
            batch.cost + other.cost - both.cost if both.padded_tokens <= max_tokens else 0.0
            for other, both in zip(waiting, joined, strict=True)
        ]
        place = max(range(len(savings)), key=savings.__getitem__, default=None)
        if place is None or savings[place] <= 0:
            done.append(batch)
        else:
            waiting[place] = joined[place]
    return done


def _together(one: PlannedBatch, other: PlannedBatch) -> PlannedBatch:
    return PlannedBatch(one.rows + other.rows, max(one.longest, other.longest), one.domains | other.domains)


def _batch(shapes: Sequence[RowShape], rows: Sequence[int]) -> PlannedBatch:
    return PlannedBatch(tuple(rows), shapes[rows[0]].length, shapes[rows[0]].domains)
