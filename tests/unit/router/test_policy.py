"""Facts about the policy that makes a mix of scores."""

import pytest

from router.policy import RoutingPolicy


def test_a_score_must_be_above_the_threshold() -> None:
    policy = RoutingPolicy(threshold=0.25)
    assert policy.mix_from_scores({"math": 0.25, "code": 0.2500001}) == {"code": 0.2500001}


def test_the_floor_lifts_the_floor_domain() -> None:
    assert RoutingPolicy().mix_from_scores({"math": 0.9, "chat": 0.01}) == {"math": 0.9, "chat": 0.20}


def test_the_floor_is_no_ceiling() -> None:
    assert RoutingPolicy().mix_from_scores({"chat": 0.7}) == {"chat": 0.7}


def test_the_floor_invents_no_domain() -> None:
    assert RoutingPolicy().mix_from_scores({"math": 0.9, "code": 0.05}) == {"math": 0.9}
    assert RoutingPolicy().mix_from_scores({"math": 0.05}) == {}


def test_a_floor_at_the_threshold_activates_nothing() -> None:
    assert RoutingPolicy(floor=0.12, threshold=0.12).mix_from_scores({"chat": 0.0}) == {}


def test_weights_are_not_normalised() -> None:
    scores = {"math": 1.0, "code": 0.95, "chat": 0.9}
    assert RoutingPolicy().mix_from_scores(scores) == scores


def test_a_gap_is_seen_before_the_floor() -> None:
    policy = RoutingPolicy()
    scores = {"chat": 0.05, "math": 0.11}
    assert policy.is_gap(scores)
    assert policy.mix_from_scores(scores) == {"chat": 0.20}


def test_one_score_at_the_gap_threshold_is_no_gap() -> None:
    policy = RoutingPolicy(gap_threshold=0.25)
    assert not policy.is_gap({"chat": 0.05, "math": 0.25})
    assert policy.is_gap({"chat": 0.05, "math": 0.2499999})


def test_a_gap_has_a_threshold_of_its_own() -> None:
    scores = {"chat": 0.3, "math": 0.6}
    assert RoutingPolicy(threshold=0.12, gap_threshold=0.7).is_gap(scores)
    assert RoutingPolicy(threshold=0.12, gap_threshold=0.7).mix_from_scores(scores) == scores
    assert not RoutingPolicy(threshold=0.9, gap_threshold=0.5).is_gap(scores)


def test_scores_are_left_as_they_were() -> None:
    scores = {"chat": 0.05}
    RoutingPolicy().mix_from_scores(scores)
    assert scores == {"chat": 0.05}


def test_wrong_constants_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], not 1.5"):
        RoutingPolicy(floor=1.5)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], not nan"):
        RoutingPolicy(threshold=float("nan"))
    with pytest.raises(ValueError, match=r"gap_threshold must be in \[0, 1\], not -0.1"):
        RoutingPolicy(gap_threshold=-0.1)
