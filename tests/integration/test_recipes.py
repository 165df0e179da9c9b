"""The recipes as they are, on tiny bases of their architecture and on stand-ins for the datasets they name."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from stack_store.registry import StackRegistry
from tests.hub_datasets import HUB, write_datasets
from training.cli import app
from training.data.decontamination import compile_keywords, decontaminate
from training.data.preparation import prepare_data
from training.data.records import Record, SourcedRecord, SourceKey
from training.data.sources import read_source
from training.data.templates import compile_templates
from training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[2]
RECIPES, DEMO_DATA = ROOT / "recipes", ROOT / "demo" / "data"
DEMO_RECORDS = 300  # of each domain
# Numbers of a run's size; all else in a recipe is tested as it is.
SMALL = {
    "steps": 2,
    "tokens_per_step": 256,
    "tokens_per_pass": 128,
    "warmup_steps": 1,
    "held_out": 3,
    "directions": 4,
}
NAMES = ("tinyllama", "gemma3-12b")
ARCHITECTURES = {"tinyllama": "llama", "gemma3-12b": "gemma3"}
DOMAINS = {
    "tinyllama": ["chat", "code", "medical", "math"],
    "gemma3-12b": ["chat", "code", "math", "medical", "reasoning"],
}
THINK = "<think>\nOkay, let me see. Wait, maybe 1.\n</think>\n\n"
# What each source makes of the first row that it keeps: prompt, answer.
FIRST_RECORDS = {
    "tinyllama": [
        ("Describe the river 0.", "It is an old river 0."),
        ("Write a function area_0.", "def area_0(side):\n    return side * 0"),
        ("What treatment helps disease 0?", "Drug 0 treats the symptoms of the disease."),
        ("Ann has 0 apples and buys 2. How many?", "0 + 2 = <<0+2=2>>2\n#### 2"),
    ],
    "gemma3-12b": [
        ("Suggest a poem 0.", "A poem about rain, 0."),
        ("Tell me about the river 0.", "The river 0 is well known."),
        ("Name a colour for the river 0.", "Blue, like the river 0."),
        ("Write a function area_0.", "def area_0(side):\n    return side * 0"),
        ("Print number 0 in python.", "print(0)  # python"),
        ("Read n from standard input and print n + 0.", "print(int(input()) + 0)"),
        ("Write a program that prints 0.", "```python\nprint(0)\n```"),
        ("Ann has 0 apples and buys 2. How many?", "0 + 2 = <<0+2=2>>2\n#### 2"),
        ("Compute the sum of 0 and 0 (cot).", "The sum of 0 and 0 is \\boxed{0}."),
        ("Solve the equation x + 0 = 9.", "Hence x = 9."),
        ("Calculate 0 + 0.", "0 + 0 = \\boxed{2 * 0}"),
        (
            "Patient 0 has a chronic disease. Best treatment?\n\nA. Drug 0\nB. Surgery\nC. Rest\nD. Insulin",
            "A. Drug 0",
        ),
        ("What is the diagnosis of patient 0?", "The diagnosis is syndrome 0."),
        ("Does drug 0 cure the disease?\n\nTrial 0 of a drug.\n\nPatients were cured.", "Yes. Drug 0 cures it."),
        ("Riddle 1: what has keys and no locks?", f"{THINK}A piano, number 1."),
        ("Which molecule is number 0?", "<think>\nOkay, wait.\n</think>\n\nWater, 0."),
        ("Puzzle 0: which number is it?", "<think>\nOkay, let me double-check 0.\n</think>\n\nIt is 0."),
        (
            "Compute the sum of 0 and 0 (tir).",
            "<think>\nOkay, wait. Let me add 0 in tir.\n</think>\n\nThe sum of 0 and 0 is \\boxed{0}.",
        ),
    ],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the datasets in it, and no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    write_datasets(tmp_path)
    yield tmp_path
    datasets.enable_progress_bars()


def shrink(name: str, folder: Path) -> Path:
    """A copy of a recipe, beside the datasets, that differs in SMALL alone."""
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    small = text
    for key, number in SMALL.items():
        small, count = re.subn(rf"(?m)^{key} = [\d_]+", f"{key} = {number}", small)
        assert count, f"{name} says nothing of {key}"
    assert without_sizes(tomllib.loads(small)) == without_sizes(tomllib.loads(text))
    path = folder / f"{name}.toml"
    path.write_text(small, encoding="utf-8")
    return path


def without_sizes(content: Any) -> Any:
    if isinstance(content, list):
        return [without_sizes(value) for value in content]
    if isinstance(content, dict):
        return {key: without_sizes(value) for key, value in content.items() if key not in SMALL}
    return content


def read_beside(name: str, folder: Path) -> Recipe:
    """The recipe as it is, read from the datasets' folder."""
    return read_recipe(Path(shutil.copy(RECIPES / f"{name}.toml", folder)))


def run(recipe: Path, base: Path, *options: str) -> tuple[int, str]:
    arguments = ["run", str(recipe), "--output", "store", "--base", str(base), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_its_domains_in_order(name: str, folder: Path, tiny_base_folder: Callable[[str], Path]) -> None:
    recipe = shrink(name, folder)
    code, output = run(recipe, tiny_base_folder(ARCHITECTURES[name]))
    assert code == 0, output
    settings = read_recipe(recipe).settings
    registry = StackRegistry.open(folder / "store")
    assert [entry.name for entry in registry.manifest.domains] == DOMAINS[name]
    for entry in registry.manifest.domains:
        report = json.loads((folder / "store" / "reports" / f"{entry.name}.json").read_text())
        assert report["too_long"] == 0
        assert report["loss"] < report["context_loss"]
        headers = [registry.header(stack) for stack in entry.stacks]
        rounds = range(1, settings.training.rounds + 1)
        assert [(h.domain, h.round, h.num_experts, h.rank) for h in headers] == [(entry.name, r, 4, 16) for r in rounds]


@pytest.mark.parametrize("name", NAMES)
def test_every_source_reads_its_datasets_own_columns(name: str, folder: Path) -> None:
    recipe = read_beside(name, folder)
    firsts = []
    for domain in recipe.settings.domains:
        for section in domain.all_sources:
            source = read_source(section, compile_templates(section, domain.name), folder)
            assert source.bad == []
            assert source.num_rows >= 24
            assert (source.filtered > 0) == (section.where is not None)
            firsts.append((source.records[0][1].prompt, source.records[0][1].output))
    assert firsts == FIRST_RECORDS[name]


def test_keywords_leave_every_domain_its_own_records(folder: Path) -> None:
    text = (RECIPES / "gemma3-12b.toml").read_text(encoding="utf-8")
    (folder / "recipe.toml").write_text(text.replace("held_out = 400", "held_out = 4"))
    report = prepare_data(read_recipe(folder / "recipe.toml")).report
    for domain in report.domains.values():
        assert (domain.counts.reassigned, domain.counts.dropped) == (0, 0)


def test_keywords_move_code_and_mathematics_out_of_real_conversations_and_little_else() -> None:
    settings = read_recipe(RECIPES / "gemma3-12b.toml").settings
    result = decontaminate(demo_records(), compile_keywords(settings.domains))
    left = {name: len(result.dropped[name]) + sum(map(len, moved.values())) for name, moved in result.moved.items()}
    for domain in ("code", "math", "medical", "reasoning"):
        assert left[domain] <= 0.03 * DEMO_RECORDS
    assert len(result.moved["chat"]["code"]) + len(result.moved["chat"]["math"]) > 0.75 * left["chat"] > 0


def demo_records() -> dict[str, list[SourcedRecord]]:
    """The first records of the demo's data, by domain."""
    pools: dict[str, list[SourcedRecord]] = {}
    for path in sorted(set(DEMO_DATA.glob("*.jsonl")) - {DEMO_DATA / "out_of_domain.jsonl"}):  # which is of none
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:DEMO_RECORDS])
        key = SourceKey(path.stem, 0)
        pools[path.stem] = [SourcedRecord(Record(row["instruction"], row["output"]), path.name, key) for row in rows]
    return pools


def test_a_stand_in_is_there_for_every_dataset_and_no_other() -> None:
    recipes = [read_recipe(path).settings for path in sorted(RECIPES.glob("*.toml"))]
    named = {
        (source.dataset, source.config, source.split.partition("[")[0])
        for settings in recipes
        for domain in settings.domains
        for source in domain.all_sources
    }
    assert named == {(dataset.name, dataset.config, dataset.split) for dataset in HUB}


@pytest.mark.parametrize(
    ("name", "missing"), [("tinyllama", "openai/gsm8k"), ("gemma3-12b", "NovaSky-AI/Sky-T1_data_17k")]
)
def test_a_dataset_that_is_not_there_is_named(
    name: str, missing: str, folder: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    recipe = shrink(name, folder)
    shutil.rmtree(folder / missing)
    code, output = run(recipe, tiny_base_folder(ARCHITECTURES[name]))
    assert code == 1
    assert f"dataset '{missing}'" in output
