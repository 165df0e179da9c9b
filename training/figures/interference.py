"""What each domain's training did to the losses of all: a matrix for each mode. Paper, figures 4 and 5.

Letters: R rows: the base, then each domain as the last one trained; D evaluated domains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.figures.canvas import Figure, new_sheet
from training.figures.heat_map import CellNames, ColourScale, Matrix, draw_cells, write_cells
from training.figures.store_reports import StoreReports
from training.reports import MODES, ForgettingReport

TITLES = {
    "isolated": "Isolated: each domain with its own rounds alone",
    "ungated": "Ungated: every trained domain at weight 1",
    "routed": "Routed: the domains that the router chooses",
}
CELL = (0.72, 0.42)  # inches


@dataclass(frozen=True, slots=True)
class InterferenceMatrix:
    """Losses in nats per answer token, (R, D); None where the domain was not trained yet, or not evaluated."""

    mode: str
    rows: tuple[str, ...]
    domains: tuple[str, ...]
    losses: Matrix
    changes: Matrix  # loss minus the base's
    colour_limit: float  # the largest change of all modes, so that their colours compare


def file_of(mode: str) -> str:
    return f"interference_{mode}.png"


def gather(reports: StoreReports) -> Mapping[str, InterferenceMatrix]:
    """Mode -> matrix, of those modes in which any loss was measured."""
    report = reports.forgetting
    if report is None:
        return {}
    domains = tuple(name for name in reports.domains if name in report.base)
    trained = tuple(name for name in domains if name in report.after)
    modes = [mode for mode in MODES if any(report.after[last].get(mode) for last in trained)]
    losses = {mode: _losses(report, mode, trained, domains) for mode in modes}
    changes = {mode: _changes(report, losses[mode], domains) for mode in modes}
    limit = max((abs(x) for matrix in changes.values() for row in matrix for x in row if x is not None), default=0.0)
    rows = ("base", *trained)
    return {mode: InterferenceMatrix(mode, rows, domains, losses[mode], changes[mode], limit) for mode in modes}


def draw(matrix: InterferenceMatrix) -> Figure:
    """Cells that show the loss, coloured by its change."""
    width, height = CELL[0] * len(matrix.domains), CELL[1] * len(matrix.rows)
    names = CellNames(matrix.rows, matrix.domains, column_inches=CELL[0])
    figure = new_sheet(
        width=width + names.left + 1.5, height=max(height + names.below, 1.6) + 0.5, title=TITLES[matrix.mode]
    )
    axes = figure.subplots()
    limit = matrix.colour_limit or 1.0
    image = draw_cells(axes, matrix.changes, ColourScale("RdBu_r", -limit, limit), square=False)
    write_cells(axes, image, [["" if loss is None else _text(loss) for loss in row] for row in matrix.losses])
    names.write(axes)
    axes.set(xlabel="evaluated on held-out examples of", ylabel="after training")
    figure.colorbar(image, ax=axes, label="loss minus base loss\n(nats per answer token)")
    return figure


def _losses(report: ForgettingReport, mode: str, trained: Sequence[str], domains: Sequence[str]) -> Matrix:
    rows = [
        tuple(
            report.after[last].get(mode, {}).get(name) if index <= domains.index(last) else None
            for index, name in enumerate(domains)
        )
        for last in trained
    ]
    return (tuple(report.base[name] for name in domains), *rows)


def _changes(report: ForgettingReport, losses: Matrix, domains: Sequence[str]) -> Matrix:
    return tuple(
        tuple(None if loss is None else loss - report.base[name] for loss, name in zip(row, domains, strict=True))
        for row in losses
    )


def _text(loss: float) -> str:
    return f"{loss:.3f}" if loss < 100 else f"{loss:.3g}"
