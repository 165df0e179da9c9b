"""How evenly each domain's experts are used: a map of layers and experts for each domain. Paper, figure 7.

Letters: L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from training.figures.canvas import Axes, AxesImage, Figure, MaxNLocator, panel_sheet
from training.figures.heat_map import ColourScale, Matrix, draw_cells
from training.figures.projections import by_layer
from training.figures.store_reports import StoreReports

FILE = "expert_utilisation.png"
PANEL = (4.2, 1.6)  # inches
MOST_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """One domain's shares of the assignments, (E, L), means over a layer's projections; None where a layer has none."""

    domain: str
    uniform: float  # 1/E
    shares: Matrix
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class ExpertMaps:
    """All panels, in the store's order."""

    panels: tuple[ExpertMap, ...]
    colour_limit: float  # the largest distance of a share from the uniform one


def gather(reports: StoreReports) -> ExpertMaps | None:
    """The maps of every domain whose report has shares, or None if none has."""
    num_layers = reports.geometry.num_layers
    panels = [_map(name, report.experts, num_layers) for name, report in reports.trained.items() if report.experts]
    if not panels:
        return None
    limit = max(max(panel.highest - panel.uniform, panel.uniform - panel.lowest) for panel in panels)
    return ExpertMaps(tuple(panels), limit)


def draw(maps: ExpertMaps) -> Figure:
    """A panel for each domain, all on one scale, white at the uniform share."""
    figure, panels = panel_sheet(
        [panel.domain for panel in maps.panels],
        panel=PANEL,
        most_columns=MOST_COLUMNS,
        title="Share of the assignments that each expert gets, mean over a layer's projections",
        x_label="layer",
        y_label="expert",
    )
    images = [_draw_panel(axes, panel, maps.colour_limit) for axes, panel in zip(panels, maps.panels, strict=True)]
    figure.colorbar(images[0], ax=panels, label="share minus 1/E", aspect=30)
    return figure


def _map(name: str, experts: Mapping[str, tuple[float, ...]], num_layers: int) -> ExpertMap:
    layers = by_layer(experts)
    num_experts = len(next(iter(experts.values())))
    shares = tuple(
        tuple(fmean(s[expert] for s in layers[layer]) if layer in layers else None for layer in range(num_layers))
        for expert in range(num_experts)
    )
    found = [share for row in shares for share in row if share is not None]
    return ExpertMap(name, 1 / num_experts, shares, min(found), max(found))


def _draw_panel(axes: Axes, panel: ExpertMap, limit: float) -> AxesImage:
    differences = tuple(tuple(None if s is None else s - panel.uniform for s in row) for row in panel.shares)
    image = draw_cells(axes, differences, ColourScale("PuOr_r", -(limit or 1.0), limit or 1.0), square=False)
    axes.set_yticks(range(len(panel.shares)), [str(expert) for expert in range(len(panel.shares))])
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_title(
        axes.get_title() + f"\n1/E {panel.uniform:.3g}, lowest {panel.lowest:.3f}, highest {panel.highest:.3f}"
    )
    return image
