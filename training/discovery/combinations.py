"""Searches for the combination of domains under which one answer costs least. Knows names and losses, no tensors.

A combination is a set of domains, each active with weight 1; the empty one is the base. Every member must pay for
itself: the best combination is the one whose loss plus `threshold` times its size is lowest. Both searches minimise
that: the exhaustive one over all combinations, the greedy one step by step, taking the member that lowers the loss
most, as long as it lowers it by more than the threshold. Of equals the smaller wins, then the one whose members come
first. If the members' gains add up, the two agree.

A search asks and is told: `wanted` names the combinations whose losses it needs next, `take` gives them to it. It asks
for each once, and it is over when it wants nothing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Protocol

DomainName = str
Combination = frozenset[DomainName]

BASE: Combination = frozenset()
BASE_NAME = "base"  # reserved: no domain is called so


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found for one prompt and its answer. Losses are means over the answer's tokens, in nats."""

    best: Combination
    soft: Combination  # soft domains: those in the best combination, and those whose addition to it lowers the loss
    losses: Mapping[Combination, float]  # of every combination that was measured

    @property
    def positive(self) -> Combination:
        """Every domain that helps: the best combination and the soft ones."""
        return self.best | self.soft


class Search(Protocol):
    """One prompt's search."""

    @property
    def wanted(self) -> tuple[Combination, ...]:
        """The combinations to be measured next; none when the search is over."""
        ...

    def take(self, losses: Mapping[Combination, float]) -> None:
        """Takes the losses of all that was wanted."""
        ...

    @property
    def outcome(self) -> Outcome:
        """What was found, once nothing is wanted."""
        ...


class GreedySearch:
    """Base and singles, then at each step the best combination so far with each other domain added."""

    def __init__(
        self,
        domains: Sequence[DomainName],
        *,
        threshold: float,
        soft_domains: Collection[DomainName] = (),
        also: Iterable[Combination] = (),
    ) -> None:
        """`also` names combinations to measure at the start for comparison, whatever the search needs."""
        self._domains, self._threshold = tuple(domains), threshold
        self._soft_domains = frozenset(soft_domains)
        self._losses: dict[Combination, float] = {}
        self._best = BASE
        self._wanted = _unique((BASE, *self._extensions(), *also))

    @property
    def wanted(self) -> tuple[Combination, ...]:
        return self._wanted

    def take(self, losses: Mapping[Combination, float]) -> None:
        self._losses |= {combination: losses[combination] for combination in self._wanted}
        self._wanted = ()
        while not self._wanted and (better := self._better()) is not None:
            self._best = better
            # What was measured for comparison is not asked for again; all of it may be known already.
            self._wanted = tuple(c for c in self._extensions() if c not in self._losses)

    @property
    def outcome(self) -> Outcome:
        return _outcome(self._best, self._losses, self._soft_domains)

    def _extensions(self) -> list[Combination]:
        return [self._best | {name} for name in self._domains if name not in self._best]

    def _better(self) -> Combination | None:
        """The best combination with the member that lowers the loss most, if it pays for itself."""
        candidate = min(self._extensions(), key=self._losses.__getitem__, default=None)
        if candidate is None or self._losses[self._best] - self._losses[candidate] <= self._threshold:
            return None
        return candidate


class ExhaustiveSearch:
    """All 2^D combinations."""

    def __init__(
        self, domains: Sequence[DomainName], *, threshold: float, soft_domains: Collection[DomainName] = ()
    ) -> None:
        self._threshold = threshold
        self._soft_domains = frozenset(soft_domains)
        self._losses: dict[Combination, float] = {}
        self._all = all_combinations(domains)

    @property
    def wanted(self) -> tuple[Combination, ...]:
        return () if self._losses else self._all

    def take(self, losses: Mapping[Combination, float]) -> None:
        self._losses = {combination: losses[combination] for combination in self._all}

    @property
    def outcome(self) -> Outcome:
        # Smaller combinations come first, and the first of equals is taken.
        best = min(self._all, key=lambda combination: self._losses[combination] + self._threshold * len(combination))
        return _outcome(best, self._losses, self._soft_domains)


def all_combinations(domains: Sequence[DomainName]) -> tuple[Combination, ...]:
    """Every set of these domains: the smaller first, then in the domains' order."""
    sizes = (combinations(domains, size) for size in range(len(domains) + 1))
    return tuple(map(frozenset, chain.from_iterable(sizes)))


def name_combination(combination: Combination, domains: Sequence[DomainName]) -> str:
    """`base`, or its members in the domains' order: `chat+math`."""
    return "+".join(name for name in domains if name in combination) or BASE_NAME


def parse_combination(name: str, domains: Collection[DomainName]) -> Combination:
    """The combination of that name. Raises ValueError if a member is none of the domains, or twice there."""
    members = () if name == BASE_NAME else tuple(name.split("+"))
    if not set(members) <= set(domains) or len(set(members)) < len(members):
        raise ValueError(f"{name!r} is no combination of {sorted(domains)}")
    return frozenset(members)


def _outcome(best: Combination, losses: Mapping[Combination, float], soft_domains: Combination) -> Outcome:
    # Both searches have measured the best combination with each other domain added.
    helping = {name for name in soft_domains - best if losses[best | {name}] < losses[best]}
    return Outcome(best=best, soft=(soft_domains & best) | helping, losses=dict(losses))


def _unique(wanted: Iterable[Combination]) -> tuple[Combination, ...]:
    return tuple(dict.fromkeys(wanted))
