"""How near the domains' subspaces lie to each other: one map over all projections, one for each. Paper, figure 8.

Letters: D domains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

from training.figures.canvas import Axes, AxesImage, Figure, new_sheet
from training.figures.heat_map import CellNames, ColourScale, Matrix, draw_cells, write_cells
from training.figures.projections import by_projection
from training.figures.store_reports import StoreReports
from training.reports import SubspaceReport

FILE = "subspace_cosines.png"
TITLE = "Mean cosine of the principal angles between the domains' leading directions"
SCALE = ColourScale("Blues", 0.0, 1.0)
CELL, LEAST_SIDE = 0.5, 3.3  # inches
SMALL_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class CosineMaps:
    """Mean cosines, (D, D) each, symmetric; None where there is none, as for a domain with itself."""

    domains: tuple[str, ...]
    all_projections: Matrix
    by_projection: Mapping[str, Matrix]


def cosines_between(report: SubspaceReport, one: str, other: str) -> Mapping[str, float]:
    """Projection -> cosine, whichever of the two the report has it under; empty if it has none."""
    return report.cosines.get(one, {}).get(other) or report.cosines.get(other, {}).get(one) or {}


def gather(reports: StoreReports) -> CosineMaps | None:
    """The maps, or None if no two domains were compared."""
    if reports.subspaces is None:
        return None
    pairs = {pair: cosines_between(reports.subspaces, *pair) for pair in permutations(reports.domains, 2)}
    if not any(pairs.values()):
        return None
    kinds = {pair: by_projection(cosines) for pair, cosines in pairs.items()}
    return CosineMaps(
        domains=reports.domains,
        all_projections=_means(reports.domains, {pair: list(cosines.values()) for pair, cosines in pairs.items()}),
        by_projection={
            name: _means(reports.domains, {pair: of_pair[name] for pair, of_pair in kinds.items()})
            for name in next(iter(kinds.values()))
        },
    )


def draw(maps: CosineMaps) -> Figure:
    """One large map with its numbers, a small one for each projection beside it."""
    side = max(LEAST_SIDE, CELL * len(maps.domains))
    names = CellNames(maps.domains, maps.domains, column_inches=side / len(maps.domains))
    figure = new_sheet(width=2 * side + names.left + 1.3, height=side + names.below + 0.5, title=TITLE)
    large, small = figure.subfigures(1, 2, squeeze=False, width_ratios=[side + names.left, side + 1.3])[0]
    image = _draw_large(large.subplots(), maps.all_projections, names)
    panels = small.subplots(SMALL_COLUMNS, SMALL_COLUMNS)
    for axes in panels.flat[len(maps.by_projection) :]:
        axes.set_visible(False)
    for axes, (name, matrix) in zip(panels.flat, maps.by_projection.items(), strict=False):
        draw_cells(axes, matrix, SCALE, square=True)
        axes.set(xticks=[], yticks=[], title=name)
    small.colorbar(image, ax=panels, label="cosine: 0 orthogonal, 1 the same")
    return figure


def _draw_large(axes: Axes, matrix: Matrix, names: CellNames) -> AxesImage:
    image = draw_cells(axes, matrix, SCALE, square=True)
    write_cells(axes, image, [["" if cosine is None else f"{cosine:.2f}" for cosine in row] for row in matrix])
    names.write(axes)
    axes.set_title("mean over all projections")
    return image


def _means(domains: Sequence[str], cosines: Mapping[tuple[str, str], Sequence[float]]) -> Matrix:
    return tuple(
        tuple(fmean(found) if (found := cosines.get((row, column))) else None for column in domains) for row in domains
    )
