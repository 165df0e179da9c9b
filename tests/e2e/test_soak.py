"""The soak, short: `python -m tests.soak` is the same for half an hour and with all questions and weights."""

from pathlib import Path

import pytest

from tests.soak import QUESTIONS, Asked, Spells, run_soak

pytestmark = pytest.mark.e2e


def test_answers_stay_right_while_the_store_changes_and_nothing_is_left(tmp_path: Path) -> None:
    report = run_soak(tmp_path, Asked(QUESTIONS[:1], weights=(1.0,)), seconds=4.0, seed=1)
    assert report["counts"]["right answers"] > 0
    assert report["counts"]["hang-ups"] > 0
    assert report["loads"] > 0


def test_spell_excuses_whom_it_touched() -> None:
    spells = Spells()
    before = spells.watch("law")
    assert not before()
    spells.begin("law")
    during, other = spells.watch("law"), spells.watch("math")
    spells.end("law")
    after = spells.watch("law")
    assert [watch() for watch in (before, during, other, after)] == [True, True, False, False]
