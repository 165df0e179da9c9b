"""Shows an evaluation as Markdown. Knows the report, not how it came to be."""

from collections.abc import Iterable, Mapping, Sequence

from training.evaluating.modes import COMPARED_WITH, Mode
from training.evaluating.report import Comparison, EvaluationReport, HeldOutReport, TaskReport
from training.evaluating.statistics import Interval

HELD_OUT_NOTE = (
    "Nats per answer token on held-out records, with 95 % bootstrap intervals over records; the last row is the plain "
    "mean over the domains. `oracle` is the best combination found with the answer known: a bound, not a way to serve."
)
TASK_NOTE = (
    "Share of documents that are right, with Wilson's 95 % intervals. There is no oracle here: it is defined by the "
    "loss of a record's answer, not by a benchmark's score."
)
TEST_NOTE = (
    "Routed minus the other mode, with its 95 % interval; p is two-sided, paired, and not corrected for many tests."
)


def as_markdown(report: EvaluationReport) -> str:
    """The tables of a report, and what its numbers depend on."""
    parts = ["# Evaluation", _conditions(report)]
    if report.held_out is not None:
        parts += ["## Held-out loss", HELD_OUT_NOTE, _loss_table(report.held_out), TEST_NOTE]
        parts += [_loss_tests(report.held_out)]
    if report.benchmarks:
        parts += ["## Benchmarks", TASK_NOTE, _task_table(report.benchmarks), TEST_NOTE, _task_tests(report.benchmarks)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _conditions(report: EvaluationReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"- base: {report.base_fingerprint} ({report.base_format}, {report.dtype})",
        f"- router: {(report.router_digest or 'none')[:12]}",
        *(
            f"- {name}: {', '.join(digest[:12] for digest in digests)}"
            for name, digests in report.stack_digests.items()
        ),
        f"- seed {report.seed}, limit {report.limit or 'none'}, {versions}",
    ]
    return "\n".join(lines)


def _loss_table(held_out: HeldOutReport) -> str:
    modes = list(held_out.mean.losses)
    rows = [
        [
            name,
            str(summary.records),
            *(_interval(summary.losses[mode]) for mode in modes),
            _interval(summary.routed_to_label) if summary.routed_to_label else "-",
        ]
        for name, summary in [*held_out.domains.items(), ("mean", held_out.mean)]
    ]
    return _table(["domain", "records", *modes, "routed / label"], rows)


def _loss_tests(held_out: HeldOutReport) -> str:
    summaries = [*held_out.domains.items(), ("mean", held_out.mean)]
    return _tests("domain", [([name], summary.comparisons) for name, summary in summaries])


def _task_table(benchmarks: Mapping[str, TaskReport]) -> str:
    modes = list(next(iter(next(iter(benchmarks.values())).metrics.values())).values)
    rows = [
        [task, name, str(report.documents), *(_interval(metric.values[mode]) for mode in modes)]
        for task, report in benchmarks.items()
        for name, metric in report.metrics.items()
    ]
    return _table(["task", "metric", "documents", *modes], rows)


def _task_tests(benchmarks: Mapping[str, TaskReport]) -> str:
    rows = [
        ([f"{task} {name}"], metric.comparisons)
        for task, report in benchmarks.items()
        for name, metric in report.metrics.items()
    ]
    return _tests("task", rows)


def _tests(head: str, rows: Sequence[tuple[list[str], Sequence[Comparison]]]) -> str:
    others: list[Mode] = [mode for mode in COMPARED_WITH if any(c.other == mode for _, cs in rows for c in cs)]
    if not others:
        return "Mode `routed` was not measured beside another: nothing to test."
    cells = [[*names, *(_comparison(comparisons, other) for other in others)] for names, comparisons in rows]
    return _table([head, *(f"routed - {other}" for other in others)], cells)


def _comparison(comparisons: Iterable[Comparison], other: Mode) -> str:
    return next((f"{_interval(c.difference)}, p {c.p:.4f}" for c in comparisons if c.other == other), "-")


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
