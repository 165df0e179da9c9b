"""The numbers of a report are those of its outcomes."""

from pathlib import Path

import numpy as np
import pytest

from training.data.examples import Example
from training.discovery.combinations import BASE, Outcome
from training.discovery.prompts import LabelledExample, LabelledExamples
from training.discovery.report import DiscoverySettings, count_wins, estimate_mean, report_labels
from training.errors import RecipeInvalid
from training.recipe import read_recipe

DOMAINS = ("chat", "math", "reasoning")
SETTINGS = DiscoverySettings("greedy", 0.01, ("reasoning",), 3, 64)
CHAT, MATH, ALL = frozenset({"chat"}), frozenset({"math"}), frozenset(DOMAINS)


def labelled(label: str, tokens: int, *, is_cut: bool = False) -> LabelledExample:
    return LabelledExample(label, f"prompt {label} {tokens}", Example(tuple(range(tokens + 2)), 2), is_cut)


def test_a_label_report_counts_and_averages_its_own_prompts() -> None:
    data = LabelledExamples(
        (labelled("chat", 1), labelled("chat", 3, is_cut=True), labelled("math", 2)),
        {"chat": ("a" * 64,), "math": ()},
    )
    outcomes = [
        Outcome(CHAT, frozenset(), {BASE: 3.0, CHAT: 1.0, MATH: 2.0, ALL: 4.0}),
        Outcome(CHAT | MATH, frozenset({"reasoning"}), {BASE: 2.0, CHAT: 1.5, MATH: 2.0, ALL: 3.0, CHAT | MATH: 1.0}),
        Outcome(BASE, frozenset(), {BASE: 1.0, CHAT: 1.5, MATH: 2.0, ALL: 3.0}),
    ]
    reports = report_labels(data, outcomes, DOMAINS, SETTINGS)
    assert list(reports) == ["chat", "math"]
    chat = reports["chat"]
    assert (chat.prompts, chat.cut, chat.left_out) == (2, 1, ("a" * 64,))
    assert chat.wins == {"chat": 1, "chat+math": 1}
    assert chat.shares == {"chat": 1.0, "math": 0.5, "reasoning": 0.0}
    assert chat.soft == {"reasoning": 1}
    assert chat.losses.prompt_mean == {"base": 2.5, "label": 1.25, "ungated": 3.5, "best": 1.0}
    assert chat.losses.token_mean == {"base": 2.25, "label": 1.375, "ungated": 3.25, "best": 1.0}
    assert {mode: saved.mean for mode, saved in chat.losses.saving.items()} == pytest.approx(
        {"base": 1.5, "label": 0.25, "ungated": 2.5}
    )
    assert reports["math"].losses.saving["label"].mean == 1.0


def test_wins_stand_by_frequency_then_name() -> None:
    outcomes = [Outcome(best, frozenset(), {}) for best in (MATH, CHAT, BASE, MATH)]
    assert list(count_wins(outcomes, DOMAINS).items()) == [("math", 2), ("base", 1), ("chat", 1)]


def test_an_interval_agrees_with_the_slow_bootstrap_and_repeats_itself() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    estimate = estimate_mean(values)
    draw = np.random.default_rng(1)
    means = [np.mean([values[draw.integers(60)] for _ in range(60)]) for _ in range(2000)]
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.03)
    assert estimate == estimate_mean(values)
    alone = estimate_mean(np.array([0.5]))
    assert (alone.mean, alone.low, alone.high) == (0.5, 0.5, 0.5)


RECIPE = '[[domains]]\nname = "chat"\nfiles = ["chat.jsonl"]\n[[domains]]\nname = "math"\nfiles = ["chat.jsonl"]\n'


def test_settings_of_discovery_do_not_change_what_stacks_are_called(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").touch()
    digests = []
    for section in ("", '[discovery]\nsearch = "exhaustive"\nthreshold = 0.5\nsoft_domains = ["math"]\n'):
        (tmp_path / "recipe.toml").write_text(section + RECIPE)
        digests.append(read_recipe(tmp_path / "recipe.toml").domain_digest(1))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("section", "named"), [('soft_domains = ["law"]', "law"), ("threshold = -1.0", "-1.0"), ('search = "all"', "all")]
)
def test_an_impossible_setting_is_refused_by_name(section: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").touch()
    (tmp_path / "recipe.toml").write_text(f"[discovery]\n{section}\n{RECIPE}")
    with pytest.raises(RecipeInvalid, match=named):
        read_recipe(tmp_path / "recipe.toml")
