"""A recipe is read whole or refused by name."""

import re
import shutil
from pathlib import Path

import pytest

from training.errors import RecipeInvalid
from training.recipe import read_recipe

GOOD = 'seed = 1\n[stack]\nrank = 4\n[[domains]]\nname = "math"\nfiles = ["math.jsonl"]\n'


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "math.jsonl").touch()
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_knows_its_folder_and_text(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD))
    assert recipe.folder == tmp_path
    assert recipe.settings.stack.rank == 4
    assert recipe.settings.domains[0].files == ("math.jsonl",)
    assert recipe.text == GOOD


def test_a_domains_digest_follows_what_its_stacks_depend_on(tmp_path: Path) -> None:
    def digest(text: str, index: int = 0) -> str:
        return read_recipe(written(tmp_path, text)).domain_digest(index)

    same = digest(GOOD)
    second = '[[domains]]\nname = "code"\nfiles = ["math.jsonl"]\n'
    assert digest("# a comment\n" + GOOD) == same
    assert digest(GOOD + second) == same  # a domain added behind it
    assert digest(GOOD.replace("[[domains]]", "[router]\nepochs = 3\n[[domains]]")) == same
    assert digest(GOOD + second, 1) != same
    assert digest(GOOD.replace("seed = 1", "seed = 2")) != same
    assert digest(GOOD.replace("rank = 4", "rank = 8")) != same
    (tmp_path / "math.jsonl").write_text("{}\n")
    assert read_recipe(tmp_path / "recipe.toml").domain_digest(0) != same


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "extra = 1\n", "extra"),
        (GOOD.replace("rank = 4", "rank = 0"), "stack.rank"),
        (GOOD.replace("rank = 4", "rank = 4\ntop_k = 9"), "top_k 9"),
        (GOOD.replace("[[", "[training]\nsteps = 9\nwarmup_steps = 9\n[["), "warmup_steps is 9"),
        (GOOD.replace("[[", "[training]\ntokens_per_step = 9\ntokens_per_pass = 10\n[["), "tokens_per_pass 10"),
        (GOOD.replace("rank = 4", 'weights = "int8"\n[null_space]\nmax_share = 0.2'), "max_share is 0.2"),
        (GOOD.replace('"math"', '"forgetting"'), "'forgetting' is taken"),
        (GOOD + '[[domains]]\nname = "math"\nfiles = ["b"]\n', "math"),
        ("seed = 1\n", "domains"),
        ("seed = ", "not TOML"),
        (GOOD.replace('["math.jsonl"]', "[]"), "files"),
        (GOOD.replace("math.jsonl", "maths.jsonl"), "maths.jsonl"),
        (GOOD.replace('name = "math"', 'name = "../Math"'), "../Math"),
        ('[router]\nfloor_domain = "chta"\n' + GOOD.replace("seed = 1\n", ""), "chta"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        read_recipe(written(tmp_path, text))
    assert named in str(caught.value)


def test_the_demo_recipe_is_valid() -> None:
    recipe = read_recipe(Path(__file__).parents[3] / "demo" / "recipe.toml")
    assert [d.name for d in recipe.settings.domains] == ["chat", "code", "math", "medical", "reasoning"]
    assert all((recipe.folder / name).is_file() for d in recipe.settings.domains for name in d.files)


def test_the_recipes_of_the_page_are_valid(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    recipes = re.findall(r"```toml\n(.*?)```", (root / "docs" / "training.md").read_text(), re.DOTALL)
    shutil.copytree(root / "demo" / "data", tmp_path / "data")
    (tmp_path / "data" / "law.jsonl").write_text('{"instruction": "What is law?", "output": "Rules."}\n')
    domains = [[d.name for d in read_recipe(written(tmp_path, recipe)).settings.domains] for recipe in recipes]
    assert domains == [["law"], ["chat", "code", "math", "medical", "reasoning", "law"]]
