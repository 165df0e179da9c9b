"""A comparison shows every seed and their median, or refuses what it cannot draw by name."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from training.errors import TrainingError
from training.figures.canvas import DOTS_PER_INCH
from training.figures.comparison import Curve, draw_comparison, median_curve

LORA = [[(0, 2.0), (50, 1.0)], [(0, 2.2), (50, 1.2)]]
CURVES = st.lists(
    st.dictionaries(st.integers(0, 6), st.floats(-9, 9), min_size=1).map(lambda curve: sorted(curve.items())),
    min_size=1,
    max_size=5,
)


def test_variants_are_drawn_whole(tmp_path: Path) -> None:
    curves = {"LoRA, $r$ = 64": LORA, "_MoE-LoRA with a name that goes on and on, over two lines": LORA[:1]}
    path = draw_comparison(curves, tmp_path / "new" / "comparison.png", title="Single LoRA and MoE-LoRA")
    assert path == tmp_path / "new" / "comparison.png"
    pixels = imread(path)
    assert pixels.shape[1] == 6.5 * DOTS_PER_INCH
    assert (pixels.min(axis=2) < 0.5).mean() > 0.002
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()


@given(CURVES)
def test_the_median_is_that_of_all_seeds_at_each_step_they_share(of_seeds: Sequence[Curve]) -> None:
    expected = []
    for step in range(7):
        losses = [loss for curve in of_seeds for at, loss in curve if at == step]
        if len(losses) == len(of_seeds):
            expected.append((step, median(losses)))
    assert median_curve(of_seeds) == expected


@pytest.mark.parametrize(
    ("curves", "named"),
    [
        ({}, "no variant"),
        ({"lora": []}, "'lora' has 0 seeds"),
        ({"lora": [[(0, 1.0)], []]}, "'lora' has 2 seeds, 1 of them with a curve"),
        ({"lora": LORA, "moe": [[(0, 1.0)], [(0, 1.0), (50, math.nan)]]}, "'moe', seed 1: the loss of step 50 is nan"),
        ({"lora": [[(0, 1.0), (50, 1.0), (50, 0.9)]]}, "'lora', seed 0: step 50 comes after step 50"),
        ({"lora": [[(0, 1.0)], [(1, 1.0)]]}, "'lora': its 2 seeds have no step in common"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused_by_name(
    curves: dict[str, list[Curve]], named: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError) as caught:
        draw_comparison(curves, tmp_path / "comparison.png", title="x")
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_only_a_png_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"comparison\.pdf"):
        draw_comparison({"lora": LORA}, tmp_path / "comparison.pdf", title="x")
