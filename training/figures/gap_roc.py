"""How well the highest score tells prompts outside of the domains from those inside. Knows the router's report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.figures.canvas import INK, Axes, Figure, Line2D, new_sheet
from training.figures.series import COLOURS, draw_legend
from training.figures.store_reports import StoreReports
from training.router.reports import GapMeasure

FILE = "gap_roc.png"
SHEET = (5.0, 4.0)  # inches
CHOICE = "validation prompts, which chose the threshold"
CHECK = "held-out prompts, which chose nothing"
CHANCE: Mapping[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1}
POINT: Mapping[str, Any] = {"marker": "o", "markersize": 7, "linestyle": "none"}


@dataclass(frozen=True, slots=True)
class GapCurve:
    """Shares of prompts that lie below each threshold, and those below the one that was chosen."""

    inside: str  # which prompts
    area: float
    false_alarms: tuple[float, ...]
    caught: tuple[float, ...]
    chosen_false_alarms: float
    chosen_caught: float


@dataclass(frozen=True, slots=True)
class GapCurves:
    """Both curves."""

    threshold: float
    curves: tuple[GapCurve, ...]


def gather(reports: StoreReports) -> GapCurves | None:
    """The curves of a router whose gap signal is calibrated, else None."""
    gap = reports.router.gap if reports.router else None
    if gap is None or gap.calibration is None or gap.check is None:
        return None
    return GapCurves(gap.threshold, (_curve(CHOICE, gap.calibration), _curve(CHECK, gap.check)))


def draw(curves: GapCurves) -> Figure:
    """Both curves, the chosen threshold a dot on each."""
    figure = new_sheet(
        width=SHEET[0],
        height=SHEET[1],
        title=f"Prompts whose highest score is below a threshold; dots: below {curves.threshold:.3f}",
    )
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), **CHANCE)
    for curve, colour in zip(curves.curves, COLOURS, strict=False):
        _draw_curve(axes, curve, colour)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set(xlabel="share flagged of prompts inside the domains", ylabel="share flagged of prompts outside")
    draw_legend(figure, list(_legend(curves)))
    return figure


def _curve(inside: str, measure: GapMeasure) -> GapCurve:
    return GapCurve(
        inside=inside,
        area=measure.curve.area,
        false_alarms=measure.curve.false_alarms,
        caught=measure.curve.caught,
        chosen_false_alarms=measure.false_alarms,
        chosen_caught=measure.caught,
    )


def _draw_curve(axes: Axes, curve: GapCurve, colour: str) -> None:
    axes.plot(curve.false_alarms, curve.caught, color=colour, linewidth=1.5)
    axes.plot(curve.chosen_false_alarms, curve.chosen_caught, color=colour, **POINT)


def _legend(curves: GapCurves) -> Iterator[Line2D]:
    for curve, colour in zip(curves.curves, COLOURS, strict=False):
        yield Line2D([], [], color=colour, linewidth=1.8, label=f"{curve.inside}: area {curve.area:.3f}")
    yield Line2D([], [], label="chance", **CHANCE)
