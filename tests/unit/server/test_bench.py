"""Figures of a benchmark run, from samples that are known, and when requests are due."""

import statistics
from itertools import pairwise

import pytest

from server.bench import BenchPlan, Refusal, Route, Sample, arrivals, figures_of

ROUTES = [Route("math=1", {"math": 1.0}), Route("base", {})]
PLAN = BenchPlan("http://x", None, 3, "hello", 32, 11, ROUTES, clients=1, rate=None, seed=7)


def test_figures_follow_from_the_samples() -> None:
    answers: list[Sample | Refusal] = [
        Sample("math=1", 0.5, 1.5, 30, 0, 11, [0.1, 0.2]),
        Sample("base", 1.5, 3.5, 30, 20, 11, [0.3]),
        Refusal("math=1", 429),
    ]
    figures = figures_of(PLAN, answers, seconds=5.0)
    assert (figures["load"], figures["seed"]) == ({"clients": 1}, 7)
    assert figures["tokens_per_second"] == 4.4
    assert figures["requests_per_second"] == 0.4
    assert (figures["prompt_tokens"], figures["cached_tokens"]) == (60, 20)
    assert figures["first_token_seconds"] == {"mean": 1.0, "p50": 0.5, "p90": 1.5, "p95": 1.5, "p99": 1.5, "max": 1.5}
    assert figures["token_seconds"]["mean"] == 0.15
    assert figures["gap_seconds"]["p50"] == 0.2
    assert figures["refused"] == {"429": 1}
    math = figures["routes"]["math=1"]
    assert (math["answered"], math["refused"], math["request_seconds"]["max"]) == (1, {"429": 1}, 1.5)


def test_run_without_an_answer_has_no_spread() -> None:
    assert figures_of(PLAN, [], seconds=1.0)["request_seconds"] == {}


def test_arrivals_have_the_rate_and_are_not_regular() -> None:
    due = list(arrivals(4000, 20.0, seed=3))
    assert due == list(arrivals(4000, 20.0, seed=3)) != list(arrivals(4000, 20.0, seed=4))
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)  # an exponential distribution's mean and deviation
