"""An experiment is read whole, with every recipe it makes, or refused by name."""

from pathlib import Path

import pytest

from training.errors import RecipeInvalid
from training.experiment import Experiment, PlannedRun, read_experiment
from training.recipe import RecipeFile, read_recipe

ROOT = Path(__file__).parents[3]
RECIPE = """
seed = 7
[stack]
rank = 4
[[domains]]
name = "chat"
files = ["data.jsonl"]
[[domains]]
name = "math"
files = ["data.jsonl"]
held_out = 9
"""
GOOD = """
title = "Ranks"
recipe = "../recipe.toml"
seeds = [1, 2]
[overrides.training]
steps = 5
[overrides.domain]
held_out = 3
[variants.plain]
[variants.small]
seeds = [3]
stack.rank = 1
training.warmup_steps = 0
"""


def read(tmp_path: Path, text: str = GOOD, base_spec: str | None = None) -> Experiment:
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "experiments").mkdir(exist_ok=True)
    path = tmp_path / "experiments" / "ranks.toml"
    path.write_text(text)
    return read_experiment(path, base_spec=base_spec)


def settings_of(run: PlannedRun) -> RecipeFile:
    return run.recipe.settings


def test_every_variant_is_the_recipe_with_its_changes(tmp_path: Path) -> None:
    experiment = read(tmp_path)
    assert (experiment.title, experiment.domains) == ("Ranks", ("chat", "math"))
    assert [(run.variant, run.seed) for run in experiment.runs] == [("plain", 1), ("plain", 2), ("small", 3)]
    first, _, small = map(settings_of, experiment.runs)
    assert (first.seed, first.stack.rank, first.training.steps, first.training.warmup_steps) == (1, 4, 5, None)
    assert (small.seed, small.stack.rank, small.training.steps, small.training.warmup_steps) == (3, 1, 5, 0)
    assert [domain.held_out for domain in small.domains] == [3, 3]


def test_a_runs_text_is_a_recipe_of_the_same_run(tmp_path: Path) -> None:
    for run in read(tmp_path).runs:
        path = tmp_path / "again.toml"
        path.write_text(run.recipe.text)
        again = read_recipe(path)
        assert again.settings == run.recipe.settings
        assert again.domain_digest(1) == run.recipe.domain_digest(1)


def test_domains_are_those_asked_for_in_the_recipes_order(tmp_path: Path) -> None:
    domains = ["chat", "math"]
    assert read(tmp_path, 'domains = ["math"]\n' + GOOD).domains == ("math",)
    assert list(read(tmp_path, 'domains = ["math", "chat"]\n' + GOOD).domains) == domains
    assert [domain.name for domain in settings_of(read(tmp_path).runs[0]).domains] == domains


def test_another_base_replaces_that_of_every_variant(tmp_path: Path) -> None:
    text = GOOD + 'base.spec = "own"\nbase.dtype = "bfloat16"\n'
    assert [settings_of(run).base.spec for run in read(tmp_path, text).runs] == [None, None, "own"]
    other = read(tmp_path, text, base_spec="other").runs
    assert [settings_of(run).base.spec for run in other] == ["other"] * 3
    assert settings_of(other[2]).base.dtype == "bfloat16"
    assert 'spec = "other"' in other[0].recipe.text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD.replace("rank", "rankk"), "variant 'small': stack.rankk"),
        (GOOD.replace("rank = 1", "rank = 0"), "stack.rank"),
        (GOOD.replace("rank = 1", "top_k = 9"), "stack.top_k 9"),
        (GOOD.replace("stack.rank = 1", "stack = 3"), "variant 'small': stack: "),
        (GOOD.replace("stack.rank", "stakc.rank"), "variant 'small': stakc"),
        (GOOD.replace("steps = 5", "stepz = 5"), "variant 'plain': training.stepz"),
        (GOOD.replace("held_out = 3", "held_outs = 3"), "domains.0.held_outs"),
        (GOOD.replace("held_out = 3", 'name = "x"'), "domain.name"),
        (GOOD.replace("stack.rank = 1", 'domains = ["math"]'), "variant 'small': domains"),
        (GOOD.replace("seeds = [3]", "seed = 3"), "variant 'small': seed: "),
        ('domains = ["maths"]\n' + GOOD, "domains: the recipe has no domain 'maths'; it has ['chat', 'math']"),
        ('domains = ["math", "math"]\n' + GOOD, "domains: "),
        ("domains = []\n" + GOOD, "domains: "),
        (GOOD.replace("[1, 2]", "[1, 2, 1]"), "seeds: Value error, repeated: [1], got [1, 2, 1]"),
        (GOOD.replace("[3]", "[3, 3]"), "variants.small.seeds: Value error, repeated: [3]"),
        (GOOD.replace("[1, 2]", "[]"), "seeds: "),
        (GOOD.replace("[1, 2]", "[true]"), "seeds.0: "),
        (GOOD.replace("[variants.plain]", '[variants."../plain"]'), "../plain"),
        (GOOD[: GOOD.index("[variants.plain]")], "variants: Field required"),
        (GOOD.replace("../recipe.toml", "recipe.toml"), "experiments/recipe.toml'"),
        ("extra = 1\n" + GOOD, "extra"),
        ("title = ", "not TOML"),
    ],
)
def test_a_mistake_is_refused_by_name(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        read(tmp_path, text)
    assert named in str(caught.value)
    assert "ranks.toml" in str(caught.value)


def test_the_shipped_experiments_are_valid() -> None:
    found = {path.stem: read_experiment(path) for path in (ROOT / "recipes" / "experiments").glob("*.toml")}
    assert found.keys() == {"table1", "boosting", "null_space", "rank_sweep", "load_balance"}
    assert found["boosting"].domains == ("chat", "code", "math", "medical", "reasoning")
    tokens = {name: {_most_tokens(run) for run in experiment.runs} for name, experiment in found.items()}
    assert all(len(of_runs) == 1 for of_runs in tokens.values())  # variants see as many tokens


def _most_tokens(run: PlannedRun) -> int:
    training = settings_of(run).training
    return training.rounds * training.steps * training.tokens_per_step
