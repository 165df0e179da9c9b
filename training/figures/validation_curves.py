"""Held-out loss while each domain trained: a panel a domain, its rounds one after the other. Knows no other report."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.figures.canvas import INK, PALE, Axes, Figure, Line2D, MaxNLocator, panel_sheet
from training.figures.series import SeriesStyle, draw_legend
from training.figures.store_reports import StoreReports
from training.reports import DomainReport, RoundReport

FILE = "validation_curves.png"
PANEL = (3.0, 2.1)  # inches
MOST_COLUMNS = 4
KEPT: Mapping[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 3.5, "linewidth": 1.5}
DROPPED: Mapping[str, Any] = {**KEPT, "linestyle": "--", "markerfacecolor": "white"}


@dataclass(frozen=True, slots=True)
class RoundCurve:
    """One round; steps count from the start of the domain's first round."""

    round: int
    kept: bool
    first_step: int
    last_step: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DomainCurves:
    """One panel."""

    domain: str
    base_loss: float
    rounds: tuple[RoundCurve, ...]


@dataclass(frozen=True, slots=True)
class ValidationCurves:
    """All panels, in the store's order."""

    panels: tuple[DomainCurves, ...]


def gather(reports: StoreReports) -> ValidationCurves | None:
    """The curves of every domain that has a report, or None if none has."""
    panels = [DomainCurves(name, report.base_loss, tuple(_rounds(report))) for name, report in reports.trained.items()]
    return ValidationCurves(tuple(panels)) if panels else None


def draw(curves: ValidationCurves, styles: Mapping[str, SeriesStyle]) -> Figure:
    """A panel for each domain, in its colour."""
    figure, panels = panel_sheet(
        [panel.domain for panel in curves.panels],
        panel=PANEL,
        most_columns=MOST_COLUMNS,
        title="Held-out loss while each domain trained",
        x_label="training steps of all rounds",
        y_label="nats per answer token",
    )
    for axes, panel in zip(panels, curves.panels, strict=True):
        _draw_panel(axes, panel, styles[panel.domain].colour)
    draw_legend(figure, _legend())
    return figure


def _rounds(report: DomainReport) -> Iterator[RoundCurve]:
    first = 0
    for trained in report.rounds:
        points = _points(trained)
        last = first + max([trained.steps_run, *(step for step, _ in points)])
        steps = tuple(first + step for step, _ in points)
        yield RoundCurve(trained.round, trained.kept, first, last, steps, tuple(loss for _, loss in points))
        first = last


def _points(trained: RoundReport) -> list[tuple[int, float]]:
    """Step of the round and loss, from step 0 on. The loss that ended a round because it was not finite is left out."""
    points = [(step, loss) for step, loss in trained.validation if math.isfinite(loss)]
    return points if points and points[0][0] == 0 else [(0, trained.start_loss), *points]


def _draw_panel(axes: Axes, panel: DomainCurves, colour: str) -> None:
    axes.axhline(panel.base_loss, color=INK, linewidth=1, linestyle=":")
    for curve in panel.rounds:
        axes.plot(curve.steps, curve.losses, color=colour, **(KEPT if curve.kept else DROPPED))
        if curve.first_step:
            axes.axvline(curve.first_step, color=PALE, linewidth=0.8)
        middle = (curve.first_step + curve.last_step) / 2
        label = f"round {curve.round}" if curve.round == 1 else str(curve.round)
        axes.annotate(
            label, (middle, 1.0), xycoords=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=7, color=PALE
        )
    end = max([1, *(curve.last_step for curve in panel.rounds)])
    axes.set_xlim(-0.03 * end, 1.03 * end)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(axes.get_title(), pad=15)  # above the rounds


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], color=INK, label="kept round", **KEPT),
        Line2D([], [], color=INK, label="dropped round", **DROPPED),
        Line2D([], [], color=INK, linewidth=1, linestyle=":", label="base alone"),
    ]
