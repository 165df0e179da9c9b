"""What an evaluation writes down: values with their intervals, mode by mode, and the tests between modes.

`evaluation.json` is an EvaluationReport; its losses are in nats per answer token, its p values two-sided and paired.
`evaluation_records.jsonl` has a line per held-out record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.records import DomainName
from training.evaluating.held_out import RecordLosses
from training.evaluating.modes import COMPARED_WITH, Mode
from training.evaluating.statistics import (
    GroupLosses,
    Interval,
    loss_difference,
    loss_intervals,
    loss_p_value,
    loss_ratio,
    share_difference,
    share_interval,
    share_p_value,
)

REPORT_NAME = "evaluation"
MetricName = str
TaskName = str
Outcomes = Mapping[MetricName, Sequence[float]]  # each document's 0 or 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mode `routed` against another on the same records."""

    other: Mode
    difference: Interval  # routed minus other
    p: float


@dataclass(frozen=True, slots=True)
class LossSummary:
    """One domain's held-out loss, or the mean over the domains."""

    records: int
    answer_tokens: int
    losses: Mapping[Mode, Interval]
    comparisons: tuple[Comparison, ...]
    routed_to_label: Interval | None  # the ratio of the two losses, if both were measured


@dataclass(frozen=True, slots=True)
class HeldOutReport:
    """Held-out loss. `mean` is the plain mean over the domains of their token-weighted means."""

    domains: Mapping[DomainName, LossSummary]
    mean: LossSummary
    too_long: Mapping[DomainName, int]  # records left out


@dataclass(frozen=True, slots=True)
class MetricSummary:
    """One metric of one benchmark."""

    values: Mapping[Mode, Interval]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One benchmark."""

    domain: DomainName  # whose mix mode `label` uses
    documents: int
    chat_template: bool  # whether its questions were asked in the base's chat template
    metrics: Mapping[MetricName, MetricSummary]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Everything that was measured, and on what."""

    base_fingerprint: str
    base_format: str
    dtype: str
    stack_digests: Mapping[DomainName, tuple[str, ...]]
    router_digest: str | None
    modes: tuple[Mode, ...]
    seed: int
    limit: int | None  # records of each domain and task, at most
    held_out: HeldOutReport | None
    benchmarks: Mapping[TaskName, TaskReport]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: float  # of this run; what an earlier one had finished took no time


def summarise_held_out(
    records: Sequence[RecordLosses], too_long: Mapping[DomainName, int], *, seed: int
) -> HeldOutReport:
    """Domain by domain and on the average."""
    groups: dict[DomainName, GroupLosses] = {}
    for domain in dict.fromkeys(record.domain for record in records):
        groups[domain] = _group([record for record in records if record.domain == domain])
    return HeldOutReport(
        domains={domain: _loss_summary([group], seed) for domain, group in groups.items()},
        mean=_loss_summary(list(groups.values()), seed),
        too_long=too_long,
    )


def summarise_task(
    by_mode: Mapping[Mode, Outcomes], *, domain: DomainName, chat_template: bool, seed: int
) -> TaskReport:
    """One benchmark's documents, in the same order in every mode."""
    some = next(iter(by_mode.values()))
    return TaskReport(
        domain=domain,
        documents=len(next(iter(some.values()))),
        chat_template=chat_template,
        metrics={
            metric: _metric_summary({mode: outcomes[metric] for mode, outcomes in by_mode.items()}, seed)
            for metric in some
        },
    )


def _group(records: Sequence[RecordLosses]) -> GroupLosses:
    return GroupLosses(
        tokens=np.array([record.answer_tokens for record in records], dtype=np.float64),
        sums={mode: np.array([record.loss_sums[mode] for record in records]) for mode in records[0].loss_sums},
    )


def _loss_summary(groups: Sequence[GroupLosses], seed: int) -> LossSummary:
    measured: list[Mode] = list(groups[0].sums)  # type: ignore[arg-type]
    intervals = loss_intervals(groups, seed=seed)
    others = [other for other in COMPARED_WITH if other in measured and "routed" in measured]
    return LossSummary(
        records=sum(len(group.tokens) for group in groups),
        answer_tokens=int(sum(group.tokens.sum() for group in groups)),
        losses={mode: intervals[mode] for mode in measured},
        comparisons=tuple(
            Comparison(
                other,
                loss_difference(groups, "routed", other, seed=seed),
                loss_p_value(groups, "routed", other, seed=seed),
            )
            for other in others
        ),
        routed_to_label=loss_ratio(groups, "routed", "label", seed=seed) if "label" in others else None,
    )


def _metric_summary(by_mode: Mapping[Mode, Sequence[float]], seed: int) -> MetricSummary:
    values = {mode: np.asarray(of_mode, dtype=np.float64) for mode, of_mode in by_mode.items()}
    others = [other for other in COMPARED_WITH if other in values and "routed" in values]
    return MetricSummary(
        values={mode: share_interval(of_mode) for mode, of_mode in values.items()},
        comparisons=tuple(
            Comparison(
                other,
                share_difference(values["routed"], values[other], seed=seed),
                share_p_value(values["routed"], values[other]),
            )
            for other in others
        ),
    )
