"""Facts about intervals and tests: each fast one equals a slow one that is obviously right."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluating.statistics import (
    RESAMPLES,
    GroupLosses,
    loss_difference,
    loss_intervals,
    loss_p_value,
    loss_ratio,
    share_difference,
    share_interval,
    share_p_value,
)


def group(*records: tuple[int, float, float]) -> GroupLosses:
    """Records of (tokens, summed loss routed, summed loss base)."""
    tokens, routed, base = zip(*records, strict=True)
    return GroupLosses(np.array(tokens, float), {"routed": np.array(routed, float), "base": np.array(base, float)})


def noisy_group(seed: int, count: int = 30, gain: float = 0.0) -> GroupLosses:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 50, count).astype(float)
    base = tokens * generator.normal(2.0, 0.3, count)
    return GroupLosses(tokens, {"base": base, "routed": base - gain * tokens + generator.normal(0, 1, count)})


def test_means_are_token_weighted_in_a_group_and_plain_over_groups() -> None:
    first, second = group((1, 3.0, 1.0), (3, 3.0, 2.0)), group((10, 5.0, 20.0))
    assert loss_intervals([first], seed=0)["routed"].value == pytest.approx(6 / 4)
    assert loss_intervals([first, second], seed=0)["routed"].value == pytest.approx((6 / 4 + 5 / 10) / 2)
    assert loss_difference([first, second], "routed", "base", seed=0).value == pytest.approx(
        ((6 - 3) / 4 + (5 - 20) / 10) / 2
    )
    assert loss_ratio([first, second], "routed", "base", seed=0).value == pytest.approx((1.5 + 0.5) / (0.75 + 2.0))


def test_an_interval_is_that_of_resampling_record_by_record() -> None:
    one = noisy_group(1)
    generator = np.random.default_rng(7)
    means = []
    for _ in range(4000):
        drawn = generator.integers(0, len(one.tokens), len(one.tokens))
        means.append(one.sums["base"][drawn].sum() / one.tokens[drawn].sum())
    interval = loss_intervals([one], seed=0)["base"]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_intervals_of_many_samples_hold_the_truth_about_95_times_in_100() -> None:
    held = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sums = {"base": generator.normal(2.0, 0.5, 40)}
        interval = loss_intervals([GroupLosses(np.ones(40), sums)], seed=0)["base"]
        held += interval.low <= 2.0 <= interval.high
    assert 50 <= held <= 60


def test_a_paired_difference_is_known_better_than_the_losses_themselves() -> None:
    one = noisy_group(2, gain=0.1)
    difference = loss_difference([one], "routed", "base", seed=0)
    alone = loss_intervals([one], seed=0)["base"]
    assert difference.high - difference.low < alone.high - alone.low
    assert difference.value == pytest.approx(-0.1, abs=0.05)


def test_the_seed_decides_the_interval() -> None:
    one = noisy_group(3)
    assert loss_intervals([one], seed=1) == loss_intervals([one], seed=1) != loss_intervals([one], seed=2)


def slow_p_value(groups: list[GroupLosses]) -> float:
    """Every assignment of signs, one after the other."""
    terms = [
        (routed - base) / one.tokens.sum() / len(groups)
        for one in groups
        for routed, base in zip(one.sums["routed"], one.sums["base"], strict=True)
    ]
    observed = abs(sum(terms))
    flips = list(itertools.product((1, -1), repeat=len(terms)))
    extreme = [abs(sum(s * t for s, t in zip(signs, terms, strict=True))) >= observed - 1e-12 for signs in flips]
    return sum(extreme) / len(flips)


@pytest.mark.parametrize("gain", [0.0, 0.05, 0.3])
def test_a_p_value_is_that_of_all_sign_flips(gain: float) -> None:
    groups = [noisy_group(4, 5, gain), noisy_group(5, 6, gain)]
    assert loss_p_value(groups, "routed", "base", seed=0) == pytest.approx(slow_p_value(groups), abs=0.02)


def test_equal_losses_have_p_1_and_a_clear_gain_the_smallest_p() -> None:
    one = noisy_group(6)
    equal = GroupLosses(one.tokens, {"routed": one.sums["base"], "base": one.sums["base"]})
    assert loss_p_value([equal], "routed", "base", seed=0) == 1.0
    better = GroupLosses(one.tokens, {"routed": one.sums["base"] - one.tokens, "base": one.sums["base"]})
    assert loss_p_value([better], "routed", "base", seed=0) == 1 / (1 + RESAMPLES)


def test_shares_of_none_and_all_still_have_an_interval() -> None:
    none, everything = share_interval(np.zeros(10)), share_interval(np.ones(10))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.278, abs=0.001)  # Wilson (1927), n = 10
    assert (everything.low, everything.high) == pytest.approx((1 - none.high, 1.0))
    half = share_interval(np.array([1.0, 0.0] * 50))
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=0.0001)


def test_a_share_of_other_values_than_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="0 and 1"):
        share_interval(np.array([0.5]))
    with pytest.raises(ValueError, match="0 and 1"):
        share_interval(np.array([]))


def slow_sign_test(wins: int, losses: int) -> float:
    """Two-sided: all sequences of wins and losses whose split is at least as uneven."""
    count = wins + losses
    return sum(math.comb(count, k) for k in range(count + 1) if min(k, count - k) <= min(wins, losses)) / 2**count


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=14))
def test_the_sign_test_counts_the_records_that_differ(pairs: list[tuple[float, float]]) -> None:
    values, others = (np.array(side) for side in zip(*pairs, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    assert share_p_value(values, others) == pytest.approx(min(1.0, slow_sign_test(wins, losses)))
    assert share_p_value(values, others) == share_p_value(others, values)
    difference = share_difference(values, others, seed=0)
    assert difference.value == pytest.approx((wins - losses) / len(pairs))
    assert difference.low - 1e-9 <= difference.value <= difference.high + 1e-9
