"""The gap's threshold flags as few as it was told; the curve and its area equal a slow count."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.records import normalise_text
from training.errors import DataUnusable
from training.router.gap import gap_threshold, measure_gap, read_out_of_domain
from training.router.roc import area_under_roc, largest_threshold, roc_curve

VALUES = st.lists(st.sampled_from([i / 10 for i in range(11)]) | st.floats(0, 1), min_size=1, max_size=25)


def slow_area(lower: list[float], higher: list[float]) -> float:
    """Every pair, one at a time."""
    wins = sum(1.0 if low < high else 0.5 if low == high else 0.0 for low in lower for high in higher)
    return wins / (len(lower) * len(higher))


@given(VALUES, VALUES)
def test_the_area_equals_a_count_of_all_pairs_and_the_area_under_the_points(
    lower: list[float], higher: list[float]
) -> None:
    curve = roc_curve(lower, higher)
    assert curve.area == pytest.approx(slow_area(lower, higher), abs=1e-12)
    assert np.trapezoid(curve.caught, curve.false_alarms) == pytest.approx(curve.area, abs=1e-12)


@given(VALUES, VALUES)
def test_the_curve_has_a_point_for_every_threshold(lower: list[float], higher: list[float]) -> None:
    curve = roc_curve(lower, higher)
    points = set(zip(curve.false_alarms, curve.caught, strict=True))
    for threshold in (0.0, *lower, *higher, 2.0):
        flagged = [sum(value < threshold for value in values) / len(values) for values in (higher, lower)]
        assert tuple(flagged) in points
    assert (curve.false_alarms[0], curve.caught[0]) == (0.0, 0.0)
    assert (curve.false_alarms[-1], curve.caught[-1]) == (1.0, 1.0)
    assert list(curve.caught) == sorted(curve.caught)


@given(VALUES, st.floats(0, 0.99))
def test_the_threshold_is_the_largest_that_flags_no_more_than_it_may(values: list[float], share: float) -> None:
    threshold = largest_threshold(values, max_share=share)

    def flagged(at: float) -> float:
        return sum(value < at for value in values) / len(values)

    assert flagged(threshold) <= share + 1e-9
    assert flagged(np.nextafter(threshold, 2.0)) > share - 1e-9


def test_five_percent_of_a_hundred_are_five() -> None:
    scores = [i / 100 for i in range(100)]
    assert gap_threshold(scores, max_false_alarms=0.05) == 0.05
    assert gap_threshold(scores, max_false_alarms=0.0) == 0.0
    assert gap_threshold(scores, max_false_alarms=0.29) == 0.29  # 0.29 * 100 is less than 29 in floats


def test_a_threshold_is_measured_on_both_kinds() -> None:
    measured = measure_gap([0.2, 0.6, 0.8, 0.9], [0.1, 0.2, 0.7], threshold=0.6)
    assert (measured.num_in_domain, measured.num_out_of_domain) == (4, 3)
    assert (measured.false_alarms, measured.caught) == (1 / 4, 2 / 3)
    assert measured.curve.area == pytest.approx(slow_area([0.1, 0.2, 0.7], [0.2, 0.6, 0.8, 0.9]))


def test_one_kind_alone_has_no_area() -> None:
    assert area_under_roc([], [0.5]) is None
    with pytest.raises(ValueError, match="both kinds, not 1 and 0"):
        roc_curve([0.5], [])
    with pytest.raises(ValueError, match=r"share of 1\.0"):
        largest_threshold([0.5], max_share=1.0)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_prompts_outside_are_read_in_order(tmp_path: Path) -> None:
    path = lines(tmp_path / "out.jsonl", {"prompt": "one", "source": "x"}, "", {"prompt": "two\nlines"})
    assert read_out_of_domain(path) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "one"}, r"out\.jsonl:2: field 'prompt' must be a text with words, got None"),
        ({"prompt": "  "}, r"out\.jsonl:2: field 'prompt' must be a text with words, got '  '"),
        ("[1]", r"out\.jsonl:2: expected an object, got list"),
        ("{", r"out\.jsonl:2: not JSON"),
        ({"prompt": "one"}, r"out\.jsonl: 1 different prompts, needs at least 2"),
        ({"prompt": " ONE "}, r"out\.jsonl: 1 different prompts, needs at least 2"),
    ],
)
def test_a_file_of_prompts_outside_that_is_unsound_is_refused_by_name(tmp_path: Path, row: object, fault: str) -> None:
    with pytest.raises(DataUnusable, match=fault):
        read_out_of_domain(lines(tmp_path / "out.jsonl", {"prompt": "one"}, row))


def test_no_domain_of_the_demo_asks_what_its_file_of_prompts_outside_asks() -> None:
    folder = Path(__file__).parents[4] / "demo" / "data"
    outside = {normalise_text(prompt) for prompt in read_out_of_domain(folder / "out_of_domain.jsonl")}
    inside = {
        normalise_text(json.loads(line)["instruction"])
        for path in folder.glob("*.jsonl")
        if path.name != "out_of_domain.jsonl"
        for line in path.read_text().splitlines()
    }
    assert len(outside) == 200
    assert len(inside) > 3000
    assert outside.isdisjoint(inside)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable, match=r"nothing\.jsonl"):
        read_out_of_domain(tmp_path / "nothing.jsonl")
