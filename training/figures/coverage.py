"""Names what a store's reports lack for its figures to be whole. Knows what there should be, not how it is drawn.

A part of a report is named by its path, such as `after.math.routed in reports/forgetting.json`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from stack_store.header import PROJECTIONS, Geometry
from training.discovery.report import REPORT_NAME, DiscoveryReport
from training.figures.store_reports import StoreReports, report_file
from training.figures.subspace_cosines import cosines_between
from training.reports import MODES, ForgettingReport, SubspaceReport
from training.router.reports import ROUTER_REPORT, RouterReport


def missing_parts(reports: StoreReports) -> tuple[str, ...]:
    """Each report, or part of one, that is not there, and the domains of reports that the store does not have."""
    domains, parts = reports.domains, list[str]()
    for name in domains:
        trained = reports.trained.get(name)
        lacking = _projections("experts", trained.experts, reports.geometry) if trained else None
        parts += _in_file(name, lacking)
    parts += _in_file("forgetting", _losses(reports.forgetting, domains) if reports.forgetting else None)
    parts += _in_file("subspaces", _subspaces(reports.subspaces, reports) if reports.subspaces else None)
    parts += _in_file(REPORT_NAME, _outcomes(reports.discovery, domains) if reports.discovery else None)
    parts += _in_file(ROUTER_REPORT, _router(reports.router) if reports.router else None)
    return tuple(parts)


def _in_file(report: str, lacking: Iterable[str] | None) -> list[str]:
    """The parts that a report lacks, or the report itself if it is not there."""
    file = report_file(report)
    return [file] if lacking is None else [f"{part} in {file}" for part in lacking]


def _projections(path: str, values: Mapping[str, object], geometry: Geometry) -> Iterator[str]:
    """Nothing if `values` has every projection of every layer."""
    wanted = geometry.num_layers * len(PROJECTIONS)
    if not values:
        yield path
    elif len(values) < wanted:
        yield f"{wanted - len(values)} of the {wanted} projections of {path}"


def _losses(report: ForgettingReport, domains: Sequence[str]) -> Iterator[str]:
    yield from (f"base.{domain}" for domain in domains if domain not in report.base)
    drawn = [mode for mode in MODES if any(mode in report.after.get(domain, {}) for domain in domains)]
    yield from (f"after.*.{mode}" for mode in MODES if mode not in drawn)
    for index, last in enumerate(domains):
        if last not in report.after:
            yield f"after.{last}"
            continue
        for mode in drawn:
            losses = report.after[last].get(mode)
            if losses is None:
                yield f"after.{last}.{mode}"
            else:
                yield from (f"after.{last}.{mode}.{name}" for name in domains[: index + 1] if name not in losses)
    yield from _strangers({*report.base, *report.after}, domains)


def _subspaces(report: SubspaceReport, reports: StoreReports) -> Iterator[str]:
    for field, by_domain in (("singular_values", report.singular_values), ("protected_share", report.protected_share)):
        if not any(domain in by_domain for domain in reports.domains):
            yield field
            continue
        for domain in reports.domains:
            yield from _projections(f"{field}.{domain}", by_domain.get(domain, {}), reports.geometry)
    for earlier, later in combinations(reports.domains, 2):
        yield from _projections(f"cosines.{later}.{earlier}", cosines_between(report, later, earlier), reports.geometry)
    if len(reports.domains) < 2:
        yield "a second domain to compare"
    yield from _strangers({*report.singular_values, *report.protected_share, *report.cosines}, reports.domains)


def _outcomes(report: DiscoveryReport, domains: Sequence[str]) -> Iterator[str]:
    yield from (f"labels.{domain}" for domain in domains if domain not in report.labels)
    yield from _strangers({*report.labels, *report.stack_digests}, domains)


def _router(report: RouterReport) -> Iterator[str]:
    yield from (f"gap.{side}" for side in ("calibration", "check") if getattr(report.gap, side) is None)


def _strangers(names: Iterable[str], domains: Sequence[str]) -> Iterator[str]:
    yield from (f"a place in the store for domain {name!r}" for name in sorted(set(names) - set(domains)))
