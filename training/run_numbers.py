"""Reads the numbers of one run out of its store's reports. Knows one run, not what it is compared with.

A loss is that of a report: the token-weighted mean over the answers of held-out examples, in nats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from engine.model.training_form import MoeLoraStack
from stack_store.header import Geometry
from stack_store.manifest import read_manifest
from training.curriculum import stack_config
from training.errors import ReportInvalid
from training.recipe import Recipe, StackSection
from training.reports import (
    DomainName,
    DomainReport,
    ForgettingReport,
    RoundReport,
    SubspaceReport,
    read_report,
    report_path,
)

Curve = tuple[tuple[int, float], ...]  # step, held-out loss
Report = TypeVar("Report")


@dataclass(frozen=True, slots=True)
class RoundNumbers:
    """One round."""

    start_loss: float
    best_loss: float
    kept: bool
    stop: str
    steps: int


@dataclass(frozen=True, slots=True)
class DomainNumbers:
    """One domain of one run."""

    parameters: int  # of one stack as it is stored: A, B and, where there is a choice, gates
    base_loss: float
    context_loss: float  # with what else was active while it trained
    loss: float  # with its kept rounds, in that same context
    gain: float  # base_loss - loss
    isolated: float  # these three: after the last domain that the run finished
    ungated: float
    routed: float
    rounds: tuple[RoundNumbers, ...]
    rounds_kept: int
    seconds: float
    protected_energy: float  # the largest of all projections
    mean_cosine: float | None  # over the earlier domains and all projections; None for the first domain
    least_expert_share: float  # of all experts of all projections, in round 1
    largest_expert_share: float
    near_uniform_experts: float  # of all experts of all projections, those with a share within 40 % of 1/E
    validation: Curve  # of all rounds, one after the other


def read_run(store: Path, recipe: Recipe) -> dict[DomainName, DomainNumbers]:
    """The domains that a run of this recipe has finished in the store, in the recipe's order.

    Raises ReportInvalid if what they left behind is not whole.
    """
    reports = _finished(store, recipe)
    if not reports:
        return {}
    subspaces = _read(store, "subspaces", SubspaceReport)
    last_row = _read(store, "forgetting", ForgettingReport).after[reports[-1].domain]
    parameters = num_parameters(read_manifest(store / "manifest.json").geometry, recipe.settings.stack)
    return {
        report.domain: _numbers(
            report, parameters, {mode: row[report.domain] for mode, row in last_row.items()}, subspaces
        )
        for report in reports
    }


def num_parameters(geometry: Geometry, section: StackSection) -> int:
    """Of one stack as it is stored. The noise of training is not; the gate of a single expert chooses nothing."""
    with torch.device("meta"):
        stack = MoeLoraStack(geometry, stack_config(section))
    uncounted = {"noise"} if section.num_experts > 1 else {"noise", "gate"}
    return sum(p.numel() for name, p in stack.named_parameters() if name.rpartition(".")[2] not in uncounted)


def near_uniform(shares: Sequence[float]) -> float:
    """Of a projection's E experts, those whose share of the assignments lies within 40 % of 1/E: 0.15 to 0.35 of 4."""
    return fmean(0.6 <= share * len(shares) <= 1.4 for share in shares)


def joined_validation(rounds: Sequence[RoundReport]) -> Curve:
    """The rounds' held-out losses by the number of all steps so far.

    Where one round ends and another begins there is one point, of the one that begins: the best weights of the round
    before, frozen. Losses that were not finite are left out.
    """
    points: dict[int, float] = {}
    steps_before = 0
    for trained in rounds:
        points |= {steps_before + step: loss for step, loss in trained.validation if math.isfinite(loss)}
        steps_before += trained.steps_run
    return tuple(points.items())


def _finished(store: Path, recipe: Recipe) -> list[DomainReport]:
    reports = []
    for index, domain in enumerate(recipe.settings.domains):
        report = read_report(report_path(store, domain.name), DomainReport)
        if report is None or report.recipe_digest != recipe.domain_digest(index):
            break
        reports.append(report)
    return reports


def _read(store: Path, name: str, kind: type[Report]) -> Report:
    report = read_report(report_path(store, name), kind)
    if report is None:
        raise ReportInvalid(f"{report_path(store, name)} is missing, though domains of the store are finished")
    return report


def _numbers(
    report: DomainReport, parameters: int, losses: Mapping[str, float], subspaces: SubspaceReport
) -> DomainNumbers:
    shares = [share for of_projection in report.experts.values() for share in of_projection]
    cosines = [cosine for by_name in subspaces.cosines[report.domain].values() for cosine in by_name.values()]
    return DomainNumbers(
        parameters=parameters,
        base_loss=report.base_loss,
        context_loss=report.context_loss,
        loss=report.loss,
        gain=report.base_loss - report.loss,
        isolated=losses["isolated"],
        ungated=losses["ungated"],
        routed=losses["routed"],
        rounds=tuple(RoundNumbers(r.start_loss, r.best_loss, r.kept, r.stop, r.steps_run) for r in report.rounds),
        rounds_kept=sum(r.kept for r in report.rounds),
        seconds=report.seconds,
        protected_energy=max(subspaces.protected_energy[report.domain].values()),
        mean_cosine=fmean(cosines) if cosines else None,
        least_expert_share=min(shares),
        largest_expert_share=max(shares),
        near_uniform_experts=fmean(map(near_uniform, report.experts.values())),
        validation=joined_validation(report.rounds),
    )
