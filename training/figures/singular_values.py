"""How a domain's deltas spread over directions: normalised singular values, a panel for each projection. Paper, fig. 9.

Letters: K directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

from training.figures.canvas import Axes, Figure, FuncFormatter, LogLocator, MaxNLocator, NullLocator, panel_sheet
from training.figures.projections import by_projection
from training.figures.series import SeriesStyle, draw_legend, legend_lines
from training.figures.store_reports import StoreReports

FILE = "singular_values.png"
PANEL = (2.6, 2.0)  # inches
MOST_COLUMNS = 4
MOST_MARKED = 12  # points of a line; more would hide its dashes


@dataclass(frozen=True, slots=True)
class Spectra:
    """Projection -> domain -> up to K numbers: each the median over layers, in each of which the largest is 1."""

    by_projection: Mapping[str, Mapping[str, tuple[float, ...]]]


def gather(reports: StoreReports) -> Spectra | None:
    """The spectra of every domain that has singular values, or None if none has."""
    values = reports.subspaces.singular_values if reports.subspaces else {}
    kinds = {name: by_projection(values[name]) for name in reports.domains if values.get(name)}
    if not kinds:
        return None
    projections = next(iter(kinds.values()))
    return Spectra(
        {
            projection: {name: _median_spectrum(of_domain[projection]) for name, of_domain in kinds.items()}
            for projection in projections
        }
    )


def draw(spectra: Spectra, styles: Mapping[str, SeriesStyle]) -> Figure:
    """A line for each domain, on a logarithmic scale that all panels share."""
    figure, panels = panel_sheet(
        list(spectra.by_projection),
        panel=PANEL,
        most_columns=MOST_COLUMNS,
        title="Singular values of each domain's deltas, median over layers",
        x_label="direction",
        y_label="singular value / largest singular value",
    )
    lowest = min((x for d in spectra.by_projection.values() for s in d.values() for x in s), default=1.0)
    for axes, by_domain in zip(panels, spectra.by_projection.values(), strict=True):
        _draw_panel(axes, by_domain, styles, lowest)
    draw_legend(figure, legend_lines(styles, next(iter(spectra.by_projection.values()))))
    return figure


def _draw_panel(
    axes: Axes, by_domain: Mapping[str, Sequence[float]], styles: Mapping[str, SeriesStyle], lowest: float
) -> None:
    for name, spectrum in by_domain.items():
        marked = len(spectrum) <= MOST_MARKED
        axes.plot(range(1, len(spectrum) + 1), spectrum, **styles[name].as_line(marked=marked))
    axes.set_yscale("log")
    axes.set_ylim(min(lowest, 0.5) * 0.8, 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lowest > 0.01 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _median_spectrum(of_layers: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Directions that a layer does not have count as 0 there; the zeros at the end are left out."""
    normalised = [[value / max(values) for value in values] for values in of_layers if any(values)]
    medians = [median(column) for column in zip_longest(*normalised, fillvalue=0.0)]
    return tuple(value for value in medians if value > 0)
