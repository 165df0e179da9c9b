"""Writes a store's manifest and made-up reports that look like those of real runs. Knows their fields only.

Letters: E experts, K directions.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from stack_store.header import PROJECTIONS, Geometry
from stack_store.manifest import FORMAT_VERSION, DomainEntry, Manifest, StackEntry, stack_file, write_manifest
from training.discovery.combinations import Outcome
from training.discovery.report import (
    DiscoveryReport,
    DiscoverySettings,
    Estimate,
    LabelReport,
    LossSummary,
    count_wins,
)
from training.reports import (
    MODES,
    DomainReport,
    ForgettingReport,
    RoundReport,
    SubspaceReport,
    report_path,
    write_report,
)
from training.router.calibration import calibration_of
from training.router.gap import gap_threshold, measure_gap
from training.router.reports import DomainMetrics, GapReport, RouterEvaluation, RouterMetrics, RouterReport
from training.router.target_kind import TargetKind


def write_store(
    path: Path,
    domains: Sequence[str],
    *,
    num_layers: int = 2,
    num_experts: int = 4,
    num_directions: int = 6,
    reports: Sequence[str] = ("domains", "forgetting", "subspaces", "discovery", "router"),
) -> Path:
    """A store of those domains with the reports named; returns its path. The same arguments give the same numbers."""
    path.mkdir(parents=True)
    names = [f"{layer}.{projection}" for layer in range(num_layers) for projection in PROJECTIONS]
    geometry = Geometry(num_layers, dict.fromkeys(PROJECTIONS, (8, 8)))
    entries = tuple(_entry(name) for name in domains)
    write_manifest(path / "manifest.json", Manifest(FORMAT_VERSION, "base", geometry, entries, None, 1))
    draw = random.Random(0)
    if "domains" in reports:
        for name in domains:
            write_report(report_path(path, name), domain_report(draw, name, names, num_experts=num_experts))
    if "forgetting" in reports:
        write_report(report_path(path, "forgetting"), forgetting_report(draw, domains))
    if "subspaces" in reports:
        write_report(
            report_path(path, "subspaces"), subspace_report(draw, domains, names, num_directions=num_directions)
        )
    if "discovery" in reports:
        write_report(report_path(path, "discovery"), discovery_report(draw, domains))
    if "router" in reports:
        write_report(report_path(path, "router"), router_report(draw, domains))
    return path


def domain_report(draw: random.Random, name: str, names: Sequence[str], *, num_experts: int) -> DomainReport:
    """Three rounds, of which the last gained nothing and was dropped."""
    base_loss = draw.uniform(1.0, 2.6)
    rounds, loss = [], base_loss
    for round in (1, 2, 3):
        floor = loss * (0.62, 0.96, 1.004)[round - 1]
        steps = (400, 400, 150)[round - 1]
        validation = tuple(
            (step, floor + (loss - floor) * math.exp(-step / 60) + (draw.gauss(0, 0.004) if step else 0.0))
            for step in range(0, steps + 1, 50)
        )
        best = min(value for _, value in validation)
        stop = "patience" if round == 3 else "steps"
        rounds.append(RoundReport(round, loss, best, round < 3, stop, steps, 30.0, validation, (loss, best)))
        loss = best if round < 3 else loss
    experts = {projection: _shares(draw, num_experts) for projection in names}
    return DomainReport(name, "0" * 64, 1000, 40, 0, base_loss, base_loss, loss, tuple(rounds), experts, 90.0)


def forgetting_report(draw: random.Random, domains: Sequence[str]) -> ForgettingReport:
    """Ungated losses rise with each later domain; isolated ones stay."""
    base = {name: draw.uniform(1.0, 2.6) for name in domains}
    after: dict[str, dict[str, dict[str, float]]] = {last: {mode: {} for mode in MODES} for last in domains}
    for index, name in enumerate(domains):
        own = base[name] * draw.uniform(0.55, 0.8)
        for later, last in enumerate(domains[index:]):
            after[last]["isolated"][name] = own
            after[last]["ungated"][name] = own + 0.25 * later + draw.uniform(0, 0.1)
            after[last]["routed"][name] = own + draw.uniform(-0.01, 0.05)
    return ForgettingReport(base, after)


def subspace_report(
    draw: random.Random, domains: Sequence[str], names: Sequence[str], *, num_directions: int
) -> SubspaceReport:
    """Directions nearly orthogonal, a third of the way apart in the last layers; shares that grow by the domain."""
    return SubspaceReport(
        singular_values={
            name: {
                projection: tuple(
                    sorted(
                        (draw.uniform(6, 9) * (k + 1) ** -(0.6 + 0.1 * index) for k in range(num_directions)),
                        reverse=True,
                    )
                )
                for projection in names
            }
            for index, name in enumerate(domains)
        },
        cosines={
            name: {
                earlier: {projection: draw.uniform(0.05, 0.2) + 0.1 * (index % 3) for projection in names}
                for earlier in domains[:index]
            }
            for index, name in enumerate(domains)
        },
        protected_energy={name: dict.fromkeys(names, 1e-7) for name in domains},
        overlap={name: dict.fromkeys(names, 0.1) for name in domains},
        protected_share={
            name: {projection: min(0.25, 0.06 * (index + 1) * draw.uniform(0.8, 1.0)) for projection in names}
            for index, name in enumerate(domains)
        },
    )


def discovery_report(draw: random.Random, domains: Sequence[str], *, prompts: int = 50) -> DiscoveryReport:
    """Most prompts are best answered by their own domain, alone or with one or all of the others."""
    labels: dict[str, LabelReport] = {}
    for label in domains:
        likely = [{label}, {label}, *({label, other} for other in domains), set(domains), set[str]()]
        best = [frozenset(draw.choice(likely)) for _ in range(prompts)]
        outcomes = [Outcome(members, frozenset(), {}) for members in best]
        shares = {name: sum(name in members for members in best) / prompts for name in domains}
        labels[label] = LabelReport(prompts, 2, (), count_wins(outcomes, domains), shares, {}, _loss_summary(draw))
    return DiscoveryReport(
        base_fingerprint="base",
        settings=DiscoverySettings("greedy", 0.01, (), prompts, 512),
        stack_digests={name: (hashlib.sha256(name.encode()).hexdigest(),) for name in domains},
        labels=labels,
        losses=_loss_summary(draw),
        rows_measured=700,
        rows_from_cache=0,
        seconds=60.0,
        outcomes_sha256="0" * 64,
    )


def router_report(draw: random.Random, domains: Sequence[str]) -> RouterReport:
    """Scores that are nearly calibrated; prompts outside lie mostly below those inside."""
    inside, outside = ([draw.betavariate(*shape) for _ in range(80)] for shape in ((6, 1), (2, 3)))
    threshold = gap_threshold(inside[:40], max_false_alarms=0.05)
    sides = [measure_gap(inside[half], outside[half], threshold=threshold) for half in (slice(40), slice(40, 80))]
    return RouterReport(
        targets=TargetKind.DISCOVERED,
        num_train=90,
        num_validation=10,
        prompts=dict.fromkeys(domains, 50),
        unsearched_prompts=dict.fromkeys(domains, 0),
        routers={kind: _router_evaluation(draw, domains) for kind in TargetKind},
        gap=GapReport(threshold, 0.05, calibration=sides[0], check=sides[1]),
    )


def _router_evaluation(draw: random.Random, domains: Sequence[str]) -> RouterEvaluation:
    scores = torch.tensor([draw.betavariate(0.4, 0.4) for _ in range(200)])
    right = torch.tensor([draw.random() < score for score in scores.tolist()])
    of_domains = dict.fromkeys(domains, DomainMetrics(0.9, None, 10))
    metrics = RouterMetrics(0.9, 0.8, 0.1, None, 0.7, 40, 0, 40, of_domains)
    return RouterEvaluation(0.9, metrics, calibration_of(scores, right), best_epoch=3)


def _loss_summary(draw: random.Random) -> LossSummary:
    best = draw.uniform(1.0, 2.0)
    means = {"base": best + 0.5, "label": best + 0.02, "ungated": best + 0.7, "best": best}
    saving = {mode: Estimate(loss - best, loss - best - 0.01, loss - best + 0.01) for mode, loss in means.items()}
    return LossSummary(means, means, {mode: saved for mode, saved in saving.items() if mode != "best"})


def _shares(draw: random.Random, num_experts: int) -> tuple[float, ...]:
    weights = [draw.uniform(0.8, 1.2) for _ in range(num_experts)]
    return tuple(weight / sum(weights) for weight in weights)


def _entry(name: str) -> DomainEntry:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return DomainEntry(name, (StackEntry(digest, stack_file(name, 1, digest), 1, 1),))
