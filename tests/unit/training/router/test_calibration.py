"""The expected calibration error equals a slow count, and is what it should be where one can tell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.router.calibration import NUM_BINS, calibration_of

Scored = list[tuple[float, bool]]
SCORED = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60)


def slow_error(scored: Scored, num_bins: int) -> float:
    """Guo et al. 2017, equation 3, one bin and one score at a time."""
    error = 0.0
    for place in range(1, num_bins + 1):
        lower, upper = (place - 1) / num_bins, place / num_bins
        inside = [(score, right) for score, right in scored if lower < score <= upper or (place == 1 and score == 0.0)]
        if inside:
            confidence = sum(score for score, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / len(scored) * abs(accuracy - confidence)
    return error


def columns(scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([score for score, _ in scored]), torch.tensor([right for _, right in scored])


@given(SCORED, st.integers(1, 20))
def test_the_error_equals_a_slow_count(scored: Scored, num_bins: int) -> None:
    assert calibration_of(*columns(scored), num_bins=num_bins).expected_error == pytest.approx(
        slow_error(scored, num_bins), abs=1e-9
    )


@given(SCORED)
def test_every_score_is_in_one_bin_between_its_edges(scored: Scored) -> None:
    bins = calibration_of(*columns(scored)).bins
    assert len(bins) == NUM_BINS == 15
    assert sum(of_bin.num_scores for of_bin in bins) == len(scored)
    assert [of_bin.lower for of_bin in bins[1:]] == [of_bin.upper for of_bin in bins[:-1]]
    for of_bin in bins:
        assert (of_bin.mean_score is None) == (of_bin.positive_share is None) == (of_bin.num_scores == 0)
        if of_bin.mean_score is not None:
            assert of_bin.lower - 1e-9 <= of_bin.mean_score <= of_bin.upper + 1e-9


def test_scores_on_the_edges_are_in_the_bin_below() -> None:
    bins = calibration_of(torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([False] * 4), num_bins=4).bins
    assert [of_bin.num_scores for of_bin in bins] == [2, 1, 0, 1]


def test_true_probabilities_have_no_error_and_lies_all_of_it() -> None:
    scores = torch.cat([torch.full((100,), 0.3), torch.full((100,), 0.9)])
    right = torch.cat([torch.arange(100) < 30, torch.arange(100) < 90])
    assert calibration_of(scores, right).expected_error == pytest.approx(0.0, abs=1e-7)
    assert calibration_of(torch.tensor([1.0, 0.0]), torch.tensor([False, True])).expected_error == 1.0


def test_nothing_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="needs a score"):
        calibration_of(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
