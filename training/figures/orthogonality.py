"""How far each layer keeps the domains apart, and how much of it they claim. Paper, figure 10.

Letters: L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from training.figures.canvas import Axes, Figure, MaxNLocator, new_sheet
from training.figures.projections import by_layer
from training.figures.series import SeriesStyle, draw_legend, legend_lines
from training.figures.store_reports import StoreReports
from training.figures.subspace_cosines import cosines_between
from training.reports import SubspaceReport

FILE = "orthogonality_by_layer.png"
WIDTH, PANEL_HEIGHT = 7.0, 2.1  # inches

Lines = Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class LayerLines:
    """Domain -> L numbers, means over a layer's projections; None where a layer has none."""

    cosines: Lines  # between a domain and all earlier ones
    protected_share: Lines  # of a projection's outputs, after the domain


def gather(reports: StoreReports) -> LayerLines | None:
    """The lines of the domains that have any, or None if none has."""
    report, num_layers = reports.subspaces, reports.geometry.num_layers
    if report is None:
        return None
    lines = LayerLines(
        cosines=_lines({name: _earlier(report, name, reports.domains) for name in reports.domains}, num_layers),
        protected_share=_lines({name: [report.protected_share.get(name, {})] for name in reports.domains}, num_layers),
    )
    return lines if lines.cosines or lines.protected_share else None


def draw(lines: LayerLines, styles: Mapping[str, SeriesStyle]) -> Figure:
    """A panel for the cosines and one for the shares, as far as there are any."""
    panels = [
        (lines.cosines, "mean cosine to\nearlier domains"),
        (lines.protected_share, "protected share\nof the outputs"),
    ]
    panels = [(by_domain, label) for by_domain, label in panels if by_domain]
    figure = new_sheet(
        width=WIDTH, height=PANEL_HEIGHT * len(panels) + 0.4, title="Overlap and protection of the domains by layer"
    )
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (by_domain, label) in zip(grid, panels, strict=True):
        _draw_lines(axes, by_domain, styles)
        axes.set_ylabel(label)
    grid[-1].set_xlabel("layer")
    draw_legend(figure, legend_lines(styles, {*lines.cosines, *lines.protected_share}))
    return figure


def _earlier(report: SubspaceReport, name: str, domains: Sequence[str]) -> list[Mapping[str, float]]:
    return [cosines_between(report, name, earlier) for earlier in domains[: domains.index(name)]]


def _lines(values: Mapping[str, Sequence[Mapping[str, float]]], num_layers: int) -> Lines:
    """Domain -> mean of each layer, over all its mappings; a domain without any number has no line."""
    return {name: _means(mappings, num_layers) for name, mappings in values.items() if any(mappings)}


def _means(mappings: Sequence[Mapping[str, float]], num_layers: int) -> tuple[float | None, ...]:
    layers = [by_layer(mapping) for mapping in mappings]
    found = [[value for of_layer in layers for value in of_layer.get(index, [])] for index in range(num_layers)]
    return tuple(fmean(numbers) if numbers else None for numbers in found)


def _draw_lines(axes: Axes, by_domain: Lines, styles: Mapping[str, SeriesStyle]) -> None:
    for name, means in by_domain.items():
        heights = [math.nan if mean is None else mean for mean in means]
        axes.plot(heights, **styles[name].as_line(marked=True))
    highest = max((mean for means in by_domain.values() for mean in means if mean is not None), default=0.0)
    axes.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
