"""Draws the figures of a store and writes their numbers beside them. Knows which there are, not how they look."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stack_store.atomic import replace_file
from training.errors import TrainingError
from training.figures import (
    discovered_combinations,
    expert_utilisation,
    gap_roc,
    interference,
    orthogonality,
    reliability,
    singular_values,
    subspace_cosines,
    validation_curves,
)
from training.figures.canvas import Figure, drawing_style, save_sheet
from training.figures.coverage import missing_parts
from training.figures.series import series_styles
from training.figures.store_reports import StoreReports, read_store_reports

NUMBERS_FILE = "figures.json"


@dataclass(frozen=True, slots=True)
class FigureResult:
    """What was written, and which reports or parts of them were not there."""

    written: tuple[Path, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedFigure:
    """One figure: its file, its numbers, and how they are drawn."""

    file: str
    numbers: Any  # a dataclass of plain values
    draw: Callable[[], Figure]


def draw_figures(store: Path, output: Path) -> FigureResult:
    """Writes every figure that the store's reports allow, and their numbers, into the folder `output`.

    Needs no base. Raises StoreError or TrainingError, naming the fault, before anything is written.
    """
    reports = read_store_reports(store)
    plans, missing = list(plan_figures(reports)), missing_parts(reports)
    if not plans:
        raise TrainingError(f"store {store} has nothing to draw: it lacks {', '.join(missing)}")
    with drawing_style():
        for plan in plans:
            save_sheet(plan.draw(), output / plan.file)
    _write_numbers(reports, plans, output / NUMBERS_FILE)
    return FigureResult((*(output / plan.file for plan in plans), output / NUMBERS_FILE), missing)


def plan_figures(reports: StoreReports) -> Iterator[PlannedFigure]:
    """The figures that the reports allow; nothing is drawn yet."""
    styles = series_styles(reports.domains)
    if curves := validation_curves.gather(reports):
        yield PlannedFigure(validation_curves.FILE, curves, partial(validation_curves.draw, curves, styles))
    for mode, matrix in interference.gather(reports).items():
        yield PlannedFigure(interference.file_of(mode), matrix, partial(interference.draw, matrix))
    if cosines := subspace_cosines.gather(reports):
        yield PlannedFigure(subspace_cosines.FILE, cosines, partial(subspace_cosines.draw, cosines))
    if spectra := singular_values.gather(reports):
        yield PlannedFigure(singular_values.FILE, spectra, partial(singular_values.draw, spectra, styles))
    if lines := orthogonality.gather(reports):
        yield PlannedFigure(orthogonality.FILE, lines, partial(orthogonality.draw, lines, styles))
    if experts := expert_utilisation.gather(reports):
        yield PlannedFigure(expert_utilisation.FILE, experts, partial(expert_utilisation.draw, experts))
    for shares in discovered_combinations.gather(reports):
        yield PlannedFigure(shares.file, shares, partial(discovered_combinations.draw, shares))
    if scores := reliability.gather(reports):
        yield PlannedFigure(reliability.FILE, scores, partial(reliability.draw, scores))
    if gap_curves := gap_roc.gather(reports):
        yield PlannedFigure(gap_roc.FILE, gap_curves, partial(gap_roc.draw, gap_curves))


def _write_numbers(reports: StoreReports, plans: list[PlannedFigure], path: Path) -> None:
    numbers = {"domains": reports.domains, "figures": {plan.file: asdict(plan.numbers) for plan in plans}}
    with replace_file(path) as file:
        file.write((json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode())
