"""Compares the validation curves of named variants over several seeds. Knows steps and losses, not where they are from.

Letters: S seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from training.errors import TrainingError
from training.figures.canvas import Axes, drawing_style, new_sheet, save_sheet
from training.figures.series import SeriesStyle, draw_legend, series_styles

WIDTH, HEIGHT = 6.5, 3.6  # inches

Curve = Sequence[tuple[int, float]]  # step, held-out loss


def draw_comparison(curves: Mapping[str, Sequence[Curve]], output: Path, *, title: str) -> Path:
    """Writes a PNG: per variant a thin line for each of S seeds, and their median thick. Returns its path.

    Raises TrainingError, naming variant, seed and step, for a curve that cannot be drawn.
    """
    fault = next(_faults(curves), None)
    if fault is not None:
        raise TrainingError(f"no comparison to draw: {fault}")
    if output.suffix != ".png":
        raise TrainingError(f"a figure is a PNG; {str(output)!r} does not end in .png")
    medians = {name: median_curve(of_seeds) for name, of_seeds in curves.items()}
    styles = series_styles(curves)
    with drawing_style():
        figure = new_sheet(width=WIDTH, height=HEIGHT, title=title)
        axes = figure.subplots()
        for name, of_seeds in curves.items():
            _draw_variant(axes, of_seeds, medians[name], styles[name])
        axes.set(xlabel="training steps", ylabel="held-out loss (nats per answer token)")
        draw_legend(figure, [styles[name].line(f"{name} ({_count(of_seeds)})") for name, of_seeds in curves.items()])
        save_sheet(figure, output)
    return output


def median_curve(of_seeds: Sequence[Curve]) -> list[tuple[int, float]]:
    """The median over the seeds at each step that all of them have."""
    losses = [dict(curve) for curve in of_seeds]
    return [(step, median(of_seed[step] for of_seed in losses)) for step in losses[0] if all(step in x for x in losses)]


def _draw_variant(axes: Axes, of_seeds: Sequence[Curve], medians: Curve, style: SeriesStyle) -> None:
    for curve in of_seeds:
        axes.plot(*zip(*curve, strict=True), color=style.colour, linestyle=style.dashes, linewidth=0.7, alpha=0.55)
    axes.plot(*zip(*medians, strict=True), color=style.colour, linestyle=style.dashes, linewidth=2.2)


def _faults(curves: Mapping[str, Sequence[Curve]]) -> Iterator[str]:
    if not curves:
        yield "there is no variant to compare"
    for name, of_seeds in curves.items():
        if not of_seeds or not all(of_seeds):
            yield f"variant {name!r} has {len(of_seeds)} seeds, {sum(map(bool, of_seeds))} of them with a curve"
        for seed, curve in enumerate(of_seeds):
            yield from (f"variant {name!r}, seed {seed}: {fault}" for fault in _curve_faults(curve))
        if all(of_seeds) and not median_curve(of_seeds):
            yield f"variant {name!r}: its {len(of_seeds)} seeds have no step in common"


def _curve_faults(curve: Curve) -> Iterator[str]:
    for step, loss in curve:
        if not math.isfinite(loss):
            yield f"the loss of step {step} is {loss}"
    for (step, _), (later, _) in pairwise(curve):
        if later <= step:
            yield f"step {later} comes after step {step}"


def _count(of_seeds: Sequence[Curve]) -> str:
    return "1 seed" if len(of_seeds) == 1 else f"{len(of_seeds)} seeds"
