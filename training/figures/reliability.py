"""How often a router is right at each score: a panel a router. Knows the router's report and no other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.figures.canvas import INK, PALE, Axes, Figure, Line2D, panel_sheet
from training.figures.series import COLOURS, draw_legend
from training.figures.store_reports import StoreReports
from training.router.reports import RouterEvaluation

FILE = "reliability.png"
PANEL = (3.4, 2.9)  # inches
MOST_COLUMNS = 2
CURVE: Mapping[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 3.5, "linewidth": 1.5}
DIAGONAL: Mapping[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1}
BARS: Mapping[str, Any] = {"color": PALE, "alpha": 0.35}


@dataclass(frozen=True, slots=True)
class ReliabilityPanel:
    """One router. The bins are all there; the curve has those with a score in them."""

    learnt: str
    expected_error: float
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    shares: tuple[float, ...]  # of all scores
    mean_scores: tuple[float | None, ...]
    positive_shares: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Reliability:
    """All panels; the store's router is the first."""

    measured_against: str
    panels: tuple[ReliabilityPanel, ...]


def gather(reports: StoreReports) -> Reliability | None:
    """The curves of the routers in the report, or None if there is none."""
    report = reports.router
    if report is None:
        return None
    panels = tuple(_panel(kind, evaluation) for kind, evaluation in report.routers.items())
    return Reliability(report.targets, panels)


def draw(reliability: Reliability) -> Figure:
    """The share of right scores over the mean score of each bin, and how many scores there are."""
    figure, axes = panel_sheet(
        [f"learnt {panel.learnt}: error {panel.expected_error:.3f}" for panel in reliability.panels],
        panel=PANEL,
        most_columns=MOST_COLUMNS,
        title=f"Reliability of the router's scores (targets: {reliability.measured_against})",
        x_label="score",
        y_label="share of scores whose domain is right",
    )
    for of_panel, panel in zip(axes, reliability.panels, strict=True):
        _draw_panel(of_panel, panel)
    draw_legend(figure, _legend())
    return figure


def _panel(learnt: str, evaluation: RouterEvaluation) -> ReliabilityPanel:
    bins = evaluation.calibration.bins
    total = sum(of_bin.num_scores for of_bin in bins)
    return ReliabilityPanel(
        learnt=learnt,
        expected_error=evaluation.calibration.expected_error,
        lower=tuple(of_bin.lower for of_bin in bins),
        upper=tuple(of_bin.upper for of_bin in bins),
        shares=tuple(of_bin.num_scores / total for of_bin in bins),
        mean_scores=tuple(of_bin.mean_score for of_bin in bins),
        positive_shares=tuple(of_bin.positive_share for of_bin in bins),
    )


def _draw_panel(axes: Axes, panel: ReliabilityPanel) -> None:
    widths = [upper - lower for lower, upper in zip(panel.lower, panel.upper, strict=True)]
    axes.bar(panel.lower, panel.shares, widths, align="edge", **BARS)
    axes.plot((0, 1), (0, 1), **DIAGONAL)
    scores = [score for score in panel.mean_scores if score is not None]
    shares = [share for share in panel.positive_shares if share is not None]
    axes.plot(scores, shares, **CURVE)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], label="share that is right", **CURVE),
        Line2D([], [], label="as it should be", **DIAGONAL),
        Line2D([], [], linewidth=6, label="share of all scores", **BARS),
    ]
