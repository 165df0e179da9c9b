"""Reads the reports of a store and checks them once. Knows their fields; what to draw is the figures' own affair."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack_store.errors import StoreNotFound
from stack_store.header import Geometry
from stack_store.manifest import Manifest, read_manifest
from training.discovery.combinations import parse_combination
from training.discovery.report import REPORT_NAME, DiscoveryReport
from training.errors import ReportInvalid, TrainingError
from training.figures.projections import place_of
from training.reports import (
    MODES,
    REPORTS_FOLDER,
    DomainReport,
    ForgettingReport,
    SubspaceReport,
    read_report,
    report_path,
)
from training.router.reports import ROUTER_REPORT, GapMeasure, RouterReport

DRAWN_SUBSPACES = ("singular_values", "cosines", "protected_share")


@dataclass(frozen=True, slots=True)
class StoreReports:
    """What a store's runs wrote down, as far as they did."""

    geometry: Geometry
    domains: tuple[str, ...]  # in the store's order
    trained: Mapping[str, DomainReport]  # of those domains that have a report, in the same order
    forgetting: ForgettingReport | None
    subspaces: SubspaceReport | None
    discovery: DiscoveryReport | None
    router: RouterReport | None


def report_file(name: str) -> str:
    """What people call the report of that name."""
    return f"{REPORTS_FOLDER}/{name}.json"


def read_store_reports(store: Path) -> StoreReports:
    """The reports of the store's domains. Needs no base. Raises StoreError or TrainingError, naming what is wrong."""
    manifest = _manifest(store)
    domains = tuple(entry.name for entry in manifest.domains)
    if not domains:
        raise TrainingError(f"store {store} has no domain: there is nothing to draw")
    trained = {name: read_report(report_path(store, name), DomainReport) for name in domains}
    reports = StoreReports(
        geometry=manifest.geometry,
        domains=domains,
        trained={name: report for name, report in trained.items() if report is not None},
        forgetting=read_report(report_path(store, "forgetting"), ForgettingReport),
        subspaces=read_report(report_path(store, "subspaces"), SubspaceReport),
        discovery=read_report(report_path(store, REPORT_NAME), DiscoveryReport),
        router=read_report(report_path(store, ROUTER_REPORT), RouterReport),
    )
    found = next(_faults(reports), None)
    if found is not None:
        name, fault = found
        raise ReportInvalid(f"{store / report_file(name)}: {fault}")
    return reports


def _manifest(store: Path) -> Manifest:
    if not (store / "manifest.json").is_file():
        raise StoreNotFound(f"{store} is not a store: it has no manifest.json")
    return read_manifest(store / "manifest.json")


def _faults(reports: StoreReports) -> Iterator[tuple[str, str]]:
    """A report's name, and what in it cannot be drawn."""
    for name, report in reports.trained.items():
        yield from ((name, fault) for fault in _domain_faults(name, report, reports.geometry))
    if reports.forgetting is not None:
        yield from (("forgetting", fault) for fault in _forgetting_faults(reports.forgetting))
    if reports.subspaces is not None:
        yield from (("subspaces", fault) for fault in _subspace_faults(reports.subspaces, reports.geometry))
    if reports.discovery is not None:
        yield from ((REPORT_NAME, fault) for fault in _discovery_faults(reports.discovery))
    if reports.router is not None:
        yield from ((ROUTER_REPORT, fault) for fault in _router_faults(reports.router))


def _domain_faults(name: str, report: DomainReport, geometry: Geometry) -> Iterator[str]:
    if report.domain != name:
        yield f"it is the report of domain {report.domain!r}"
    yield from _not_finite("base_loss", report.base_loss)
    for index, round_report in enumerate(report.rounds):
        yield from _not_finite(f"rounds.{index}.start_loss", round_report.start_loss)
        validation = round_report.validation
        # How such a round ended is a fact, not a fault: its last loss, and that one only, may be what stopped it.
        checked = validation[:-1] if round_report.stop == "not finite" else validation
        yield from _not_finite(f"rounds.{index}.validation", checked)
    yield from _not_finite("experts", report.experts)
    yield from _misnamed("experts", report.experts, geometry)
    numbers_of_experts = {len(shares) for shares in report.experts.values()}
    if len(numbers_of_experts) > 1 or 0 in numbers_of_experts:
        yield f"experts: the projections have {sorted(numbers_of_experts)} experts, must all have the same number"


def _forgetting_faults(report: ForgettingReport) -> Iterator[str]:
    yield from _not_finite("base", report.base)
    yield from _not_finite("after", report.after)
    for last, modes in report.after.items():
        for mode, losses in modes.items():
            if mode not in MODES:
                yield f"after.{last}: there is no mode {mode!r}, only {', '.join(MODES)}"
            for evaluated in losses:
                if evaluated not in report.base:
                    yield f"base has no loss of {evaluated!r}, which after.{last}.{mode} has"


def _subspace_faults(report: SubspaceReport, geometry: Geometry) -> Iterator[str]:
    for field in DRAWN_SUBSPACES:
        yield from _not_finite(field, getattr(report, field))
    for field, by_domain in (("singular_values", report.singular_values), ("protected_share", report.protected_share)):
        for domain, values in by_domain.items():
            yield from _misnamed(f"{field}.{domain}", values, geometry)
    for domain, others in report.cosines.items():
        for other, cosines in others.items():
            yield from _misnamed(f"cosines.{domain}.{other}", cosines, geometry)


def _discovery_faults(report: DiscoveryReport) -> Iterator[str]:
    for label, found in report.labels.items():
        yield from _not_finite(f"labels.{label}.shares", found.shares)
        if set(found.shares) != set(report.stack_digests):
            yield f"labels.{label}.shares has {sorted(found.shares)}, must have {sorted(report.stack_digests)}"
        counted = sum(found.wins.values())
        if counted != found.prompts or counted < 1:
            yield f"labels.{label}.wins counts {counted} prompts, labels.{label}.prompts {found.prompts}"
        for name in found.wins:
            try:
                parse_combination(name, report.stack_digests)
            except ValueError as error:
                yield f"labels.{label}.wins: {error}"


def _router_faults(report: RouterReport) -> Iterator[str]:
    for kind, evaluation in report.routers.items():
        where, calibration = f"routers.{kind}.calibration", evaluation.calibration
        yield from _not_finite(f"{where}.expected_error", calibration.expected_error)
        for index, of_bin in enumerate(calibration.bins):
            yield from _not_finite(f"{where}.bins.{index}", [of_bin.lower, of_bin.upper])
            means = [value for value in (of_bin.mean_score, of_bin.positive_share) if value is not None]
            yield from _not_finite(f"{where}.bins.{index}", means)
            if len(means) != (2 if of_bin.num_scores else 0):
                yield f"{where}.bins.{index} has {len(means)} means of {of_bin.num_scores} scores"
        if not sum(of_bin.num_scores for of_bin in calibration.bins):
            yield f"{where}.bins has no score"
    for side, measured in (("calibration", report.gap.calibration), ("check", report.gap.check)):
        yield from _gap_faults(f"gap.{side}", measured)


def _gap_faults(where: str, measured: GapMeasure | None) -> Iterator[str]:
    if measured is None:
        return
    curve = measured.curve
    yield from _not_finite(where, {"false_alarms": measured.false_alarms, "caught": measured.caught})
    yield from _not_finite(f"{where}.curve", {"false_alarms": curve.false_alarms, "caught": curve.caught})
    if len(curve.false_alarms) != len(curve.caught):
        yield f"{where}.curve has {len(curve.false_alarms)} false_alarms and {len(curve.caught)} caught"


def _not_finite(where: str, value: Any) -> Iterator[str]:
    """Names each number in it that is none."""
    if isinstance(value, float | int):
        if not math.isfinite(value):
            yield f"{where} is {value}, which cannot be drawn"
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, inner in items:
        yield from _not_finite(f"{where}.{key}", inner)


def _misnamed(where: str, names: Iterable[str], geometry: Geometry) -> Iterator[str]:
    for name in names:
        try:
            layer, _ = place_of(name)
        except ValueError as error:
            yield f"{where}: {error}"
        else:
            if layer >= geometry.num_layers:
                yield f"{where}.{name}: the store's base has {geometry.num_layers} layers"
