"""Figures of a benchmark run, from samples that are known."""

from server.bench import BenchPlan, Sample, figures_of


def test_figures_follow_from_the_samples() -> None:
    plan = BenchPlan("http://x", None, 1, 2, "hello", 11, {"math": 1.0})
    figures = figures_of(plan, [Sample(0.5, 1.5, 11), Sample(1.5, 3.5, 11)], seconds=5.0)
    assert figures["tokens_per_second"] == 4.4
    assert figures["requests_per_second"] == 0.4
    assert figures["first_token_seconds"] == {"mean": 1.0, "p50": 0.5, "p95": 1.5, "max": 1.5}
    assert figures["inter_token_seconds"]["mean"] == 0.15
    assert figures["mix"] == {"math": 1.0}


def test_run_without_an_answer_has_no_spread() -> None:
    plan = BenchPlan("http://x", None, 1, 1, "hello", 1, None)
    assert figures_of(plan, [], seconds=1.0)["request_seconds"] == {}
