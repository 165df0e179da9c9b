"""A whole run from the command line: recipe and data in, a store with stacks, router and reports out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.model.base import load_base
from router.checkpoint import RouterCheckpoint
from stack_store.format import read_stack
from stack_store.registry import StackRegistry
from training.cli import app

WORDS = {"greet": "hello world", "animals": "the lazy dog jumps over the quick brown fox"}


@pytest.fixture
def recipe(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> Path:
    for domain, words in WORDS.items():
        lines = [{"instruction": f"{domain} number {i} please", "output": words} for i in range(20)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        seed = 3
        [base]
        spec = "{tiny_base_folder("llama")}"
        dtype = "float32"
        [stack]
        rank = 2
        weights = "int8"
        [training]
        steps = 4
        tokens_per_step = 256
        learning_rate = 5e-3
        warmup_steps = 1
        eval_every = 2
        [router]
        epochs = 2
        floor_domain = "greet"
        [[domains]]
        name = "greet"
        files = ["greet.jsonl"]
        held_out = 4
        [[domains]]
        name = "animals"
        files = ["animals.jsonl"]
        held_out = 4
        """
    )
    return path


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_recipe_becomes_a_store_that_serving_can_open(recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, output = invoke("run", recipe, "--output", store)
    assert code == 0, output
    base = load_base(str(_spec(recipe)), base_format="nf4-dense", dtype="float32")
    registry = StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)
    assert [entry.name for entry in registry.manifest.domains] == ["greet", "animals"]
    for entry in registry.manifest.domains:
        (stack,) = entry.stacks
        header = read_stack(registry.stack_path(stack), expected_digest=stack.digest).header
        assert (header.rank, header.weights, header.domain, header.round) == (2, "int8", entry.name, 1)
        report = json.loads((store / "reports" / f"{entry.name}.json").read_text())
        assert report["loss"] < report["base_loss"]
        assert report["train_examples"] == 16

    code, output = invoke("router", recipe, "--store", store)
    assert code == 0, output
    registry = StackRegistry.open(store)
    path = registry.router_path()
    assert path is not None
    checkpoint = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
    assert checkpoint.network.domains == ("greet", "animals")
    assert checkpoint.stack_digests["greet"] == (registry.domain("greet").stacks[0].digest,)
    assert checkpoint.policy.floor_domain == "greet"


def test_a_second_run_keeps_what_the_recipe_trained_already(recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert invoke("run", recipe, "--output", store, "--until", "greet")[0] == 0
    first = StackRegistry.open(store).manifest
    code, output = invoke("run", recipe, "--output", store)
    assert code == 0
    assert "greet: kept" in output
    second = StackRegistry.open(store).manifest
    assert [entry.name for entry in second.domains] == ["greet", "animals"]
    assert second.domains[0] == first.domains[0]


def test_mistakes_are_named_and_end_with_status_one(recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, output = invoke("run", recipe, "--output", store, "--until", "grete")
    assert code == 1
    assert "grete" in output
    (tmp_path / "greet.jsonl").write_text('{"instruction": "x", "output": ""}\n')
    code, output = invoke("run", recipe, "--output", store)
    assert code == 1
    assert "greet.jsonl:1" in output


def test_a_router_needs_its_domains_trained(recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert invoke("run", recipe, "--output", store, "--until", "greet")[0] == 0
    code, output = invoke("router", recipe, "--store", store)
    assert code == 1
    assert "animals" in output


def _spec(recipe: Path) -> str:
    line = next(line for line in recipe.read_text().splitlines() if line.strip().startswith("spec"))
    return line.partition('"')[2].rstrip().rstrip('"')
