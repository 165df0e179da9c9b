"""Finds each example's best combination, many searches at once. Knows searches and losses, no tensors and no store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.data.examples import Example
from training.discovery.candidate_losses import Row, RowLosses
from training.discovery.combinations import Combination, Outcome, Search
from training.discovery.loss_cache import LossCache, LossKey, LossKeys
from training.discovery.row_loss import RowLoss

WINDOW = 128  # examples whose searches run at once: enough for full batches of every combination


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a discovery is. Rows are pairs of an example and a combination."""

    done: int  # examples
    total: int
    rows_measured: int
    rows_from_cache: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An example and a combination to try on it."""

    example: Example
    combination: Combination


class CandidateLosses:
    """Each candidate's loss: from the cache, or measured and put there, batch by batch."""

    def __init__(self, row_losses: RowLosses, cache: LossCache, keys: LossKeys) -> None:
        self._row_losses, self._cache, self._keys = row_losses, cache, keys
        self.rows_measured = 0
        self.rows_from_cache = 0

    def measure(self, candidates: Sequence[Candidate], on_batch: Callable[[], None]) -> list[RowLoss]:
        """The losses in the order of the candidates. A kill loses the batches in work.

        Batches are planned over all candidates, known or not: a run that goes on after a kill has the batches, hence
        the bits, that it would have had. What is missing of batches that are known in part is planned anew.
        """
        keys = [self._keys.key(candidate.example, candidate.combination) for candidate in candidates]
        rows = {key: _row(candidate) for key, candidate in zip(keys, candidates, strict=True)}
        losses = self._cache.get(rows)
        self.rows_from_cache += len(losses)
        missing = self._missing_batches(rows, losses)

        def keep(place: int, measured: Sequence[RowLoss]) -> None:
            found = dict(zip(missing[place], measured, strict=True))
            self._cache.put(found)
            losses.update(found)
            self.rows_measured += len(found)
            on_batch()

        self._row_losses.measure_batches([[rows[key] for key in batch] for batch in missing], keep)
        return [losses[key] for key in keys]

    def _missing_batches(self, rows: Mapping[LossKey, Row], known: Mapping[LossKey, RowLoss]) -> list[list[LossKey]]:
        whole: list[list[LossKey]] = []
        torn: dict[LossKey, Row] = {}
        for batch in self._plan(rows):
            missing = [key for key in batch if key not in known]
            if len(missing) == len(batch):
                whole.append(batch)
            else:
                torn |= {key: rows[key] for key in missing}
        return [*whole, *self._plan(torn)]

    def _plan(self, rows: Mapping[LossKey, Row]) -> Iterator[list[LossKey]]:
        keys = list(rows)
        return ([keys[index] for index in batch] for batch in self._row_losses.plan(list(rows.values())))


def find_outcomes(
    examples: Sequence[Example],
    *,
    new_search: Callable[[], Search],
    losses: CandidateLosses,
    window: int = WINDOW,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Outcome]:
    """Each example's outcome, in order. `window` examples are searched at once; it changes the last bits at most."""
    outcomes: list[Outcome] = []

    def tell() -> None:
        on_progress(Progress(len(outcomes), len(examples), losses.rows_measured, losses.rows_from_cache))

    for start in range(0, len(examples), window):
        outcomes += _search_window(examples[start : start + window], new_search, losses, tell)
        tell()
    return outcomes


def _search_window(
    examples: Sequence[Example],
    new_search: Callable[[], Search],
    losses: CandidateLosses,
    on_batch: Callable[[], None],
) -> list[Outcome]:
    searches = [new_search() for _ in examples]
    while asked := [(place, combination) for place, search in enumerate(searches) for combination in search.wanted]:
        found = losses.measure([Candidate(examples[place], combination) for place, combination in asked], on_batch)
        told: dict[int, dict[Combination, float]] = {}
        for (place, combination), loss in zip(asked, found, strict=True):
            told.setdefault(place, {})[combination] = loss.mean
        for place, of_place in told.items():
            searches[place].take(of_place)
    return [search.outcome for search in searches]


def _row(candidate: Candidate) -> Row:
    return Row(candidate.example, dict.fromkeys(sorted(candidate.combination), 1.0))
