"""A search asks for each combination once and finds one that is never worse than the base."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.discovery.combinations import (
    BASE,
    Combination,
    ExhaustiveSearch,
    GreedySearch,
    Outcome,
    Search,
    all_combinations,
    name_combination,
    parse_combination,
)

DOMAINS = ("chat", "code", "math", "medical")
SIXTEENTHS = st.integers(-64, 64).map(lambda count: count / 16)  # sums of few are exact
any_losses = st.lists(SIXTEENTHS, min_size=16, max_size=16).map(
    lambda values: dict(zip(all_combinations(DOMAINS), values, strict=True))
)
thresholds = st.integers(0, 16).map(lambda count: count / 16)


def run(search: Search, loss: Callable[[Combination], float]) -> tuple[Outcome, list[Combination]]:
    """The outcome, and every combination that was asked for, in order."""
    asked: list[Combination] = []
    while search.wanted:
        asked += search.wanted
        search.take({combination: loss(combination) for combination in search.wanted})
    return search.outcome, asked


def greedy(losses: Mapping[Combination, float], threshold: float, soft: Sequence[str] = ()) -> Outcome:
    return run(GreedySearch(DOMAINS, threshold=threshold, soft_domains=soft), losses.__getitem__)[0]


def slow_greedy(losses: Mapping[Combination, float], threshold: float) -> Combination:
    """Best-improvement search with every loss at hand."""
    best = BASE
    while True:
        larger = [best | {name} for name in DOMAINS if name not in best]
        lowest = min((losses[combination] for combination in larger), default=losses[best])
        if not losses[best] - lowest > threshold:
            return best
        best = next(combination for combination in larger if losses[combination] == lowest)


@given(any_losses, thresholds)
def test_greedy_is_best_improvement_and_never_worse_than_the_base(
    losses: Mapping[Combination, float], threshold: float
) -> None:
    outcome = greedy(losses, threshold)
    assert outcome.best == slow_greedy(losses, threshold)
    assert losses[outcome.best] <= losses[BASE] - threshold * len(outcome.best)


@given(any_losses, thresholds)
def test_exhaustive_is_best_of_all_when_each_member_pays_the_threshold(
    losses: Mapping[Combination, float], threshold: float
) -> None:
    best = run(ExhaustiveSearch(DOMAINS, threshold=threshold), losses.__getitem__)[0].best
    for other in all_combinations(DOMAINS):
        assert losses[best] + threshold * len(best) <= losses[other] + threshold * len(other)
        if len(other) > len(best):
            assert losses[other] >= losses[best] - threshold * (len(other) - len(best))


@given(st.lists(SIXTEENTHS, min_size=4, max_size=4), thresholds)
def test_where_gains_add_up_greedy_finds_what_exhaustive_finds(gains: list[float], threshold: float) -> None:
    gain = dict(zip(DOMAINS, gains, strict=True))
    losses = {combination: -sum(gain[name] for name in combination) for combination in all_combinations(DOMAINS)}
    exhaustive = run(ExhaustiveSearch(DOMAINS, threshold=threshold), losses.__getitem__)[0]
    assert greedy(losses, threshold).best == exhaustive.best == {name for name in DOMAINS if gain[name] > threshold}


@given(any_losses, thresholds, st.sets(st.sampled_from(all_combinations(DOMAINS))))
def test_each_combination_is_asked_for_once(
    losses: Mapping[Combination, float], threshold: float, also: set[Combination]
) -> None:
    for search in (
        GreedySearch(DOMAINS, threshold=threshold, also=sorted(also, key=sorted)),
        ExhaustiveSearch(DOMAINS, threshold=threshold),
    ):
        outcome, asked = run(search, losses.__getitem__)
        assert len(asked) == len(set(asked))
        assert outcome.losses == {combination: losses[combination] for combination in asked}
    assert run(GreedySearch(DOMAINS, threshold=threshold, also=also), losses.__getitem__)[0].best == slow_greedy(
        losses, threshold
    )


@given(any_losses, thresholds, st.sets(st.sampled_from(DOMAINS)))
def test_a_soft_domain_is_in_the_best_combination_or_lowers_its_loss(
    losses: Mapping[Combination, float], threshold: float, soft: set[str]
) -> None:
    outcome = greedy(losses, threshold, sorted(soft))
    best = outcome.best
    assert outcome.soft == {name for name in soft if name in best or losses[best | {name}] < losses[best]}
    assert outcome.positive == best | outcome.soft


def test_greedy_starts_with_base_singles_and_what_is_wanted_for_comparison() -> None:
    search = GreedySearch(DOMAINS, threshold=0.01, also=[frozenset(DOMAINS), BASE])
    assert search.wanted == (BASE, *(frozenset({name}) for name in DOMAINS), frozenset(DOMAINS))
    search.take({c: 1.0 - 0.1 * ("math" in c) for c in search.wanted})
    assert search.wanted == tuple(frozenset({"math", name}) for name in ("chat", "code", "medical"))


def test_a_single_that_gains_no_more_than_the_threshold_leaves_the_base() -> None:
    losses = dict.fromkeys(all_combinations(DOMAINS), 1.0) | {frozenset({"math"}): 0.75}
    assert greedy(losses, 0.25).best == BASE
    assert greedy(losses, 0.125).best == {"math"}


def test_combinations_are_named_in_the_order_of_the_domains() -> None:
    assert name_combination(frozenset({"math", "chat"}), DOMAINS) == "chat+math"
    assert name_combination(BASE, DOMAINS) == "base"
    for members in (members for size in range(5) for members in combinations(DOMAINS, size)):
        assert parse_combination(name_combination(frozenset(members), DOMAINS), DOMAINS) == set(members)


@pytest.mark.parametrize("name", ["law", "chat+law", "chat+chat", "", "base+chat"])
def test_a_name_of_no_combination_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no combination"):
        parse_combination(name, DOMAINS)
