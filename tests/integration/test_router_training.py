"""Routers from the command line: trained on labels, on outcomes, extended; on a tiny base with random stacks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from engine.model.base import Base, load_base
from engine.model.hidden import hidden_states
from engine.model.moe_lora import MoeLoraConfig
from router.checkpoint import RouterCheckpoint
from router.router import Router
from stack_store.format import pack_groups, write_stack
from stack_store.registry import StackRegistry
from tests.stacks import header_for, random_projections
from training.cli import app
from training.reports import read_report, report_path
from training.router.features import feature_cache_path
from training.router.reports import ExtensionReport, RouterReport
from training.router.target_kind import TargetKind

DOMAINS = ("greet", "animals", "world")
PROMPTS = {
    "greet": "hello {0} and hello again {0}",
    "animals": "the brown fox {0} jumps over the dog",
    "world": "says the world {0} to the world",
}
CONFIG = MoeLoraConfig(num_experts=4, rank=2, top_k=2)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")


@pytest.fixture
def recipe(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> Path:
    return write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS)


@pytest.fixture
def store(tmp_path: Path, base: Base) -> Path:
    """A store of the first two domains."""
    path = tmp_path / "store"
    StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry).close()
    for name in DOMAINS[:2]:
        register(path, base, name)
    return path


def write_recipe(folder: Path, base_folder: Path, domains: tuple[str, ...], *, more: str = "") -> Path:
    lines = [f'[base]\nspec = "{base_folder}"\ndtype = "float32"']
    lines.append(f'[router]\nepochs = 4\nfloor_domain = "greet"\nvalidation_share = 0.3\n{more}')
    for name in domains:
        records = [{"instruction": PROMPTS[name].format(i), "output": f"the answer is {i}"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        lines.append(f'[[domains]]\nname = "{name}"\nfiles = ["{name}.jsonl"]\nheld_out = 4')
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines))
    return path


def register(store: Path, base: Base, domain: str, *, seed: int = 0) -> None:
    header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=domain)
    file = store.parent / f"{domain}.safetensors"
    write_stack(file, header, pack_groups(header, random_projections(base.geometry, CONFIG, seed=seed, size=0.02)))
    registry = StackRegistry.open(store)
    registry.register_domain(domain, [file])
    registry.close()


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def train(recipe: Path, store: Path, *options: object) -> str:
    code, output = invoke("router", recipe, "--store", store, *options)
    assert code == 0, output
    return output


def refusal(*arguments: object) -> str:
    code, output = invoke(*arguments)
    assert code == 1, output
    return output


def checkpoint_of(store: Path) -> RouterCheckpoint:
    path = StackRegistry.open(store).router_path()
    assert path is not None
    return RouterCheckpoint.load(path)


def report_of(store: Path) -> RouterReport:
    report = read_report(report_path(store, "router"), RouterReport)
    assert report is not None
    return report


def router_of(checkpoint: RouterCheckpoint, base: Base) -> Router:
    return Router.from_checkpoint(
        checkpoint,
        tokenizer=base.tokenizer,
        hidden_states=lambda ids: hidden_states(base, ids, checkpoint.settings.mid_layer),
    )


def test_labels_are_learnt_where_nothing_was_discovered(
    tmp_path: Path, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    two = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2])
    output = train(two, store)
    assert "targets: labels; 28 prompts to train on, 12 to validate" in output
    assert "not calibrated: the recipe names no router.out_of_domain" in output
    report = report_of(store)
    assert (report.targets, list(report.routers), report.prompts) == (
        TargetKind.LABELS,
        [TargetKind.LABELS],
        {"greet": 20, "animals": 20},
    )
    evaluation = report.routers[TargetKind.LABELS]
    assert (evaluation.label_top1, evaluation.metrics.top1) == (1.0, 1.0)
    assert sum(of_bin.num_scores for of_bin in evaluation.calibration.bins) == 12 * 2
    checkpoint = checkpoint_of(store)
    assert checkpoint.policy.gap_threshold == checkpoint.policy.threshold == report.gap.threshold == 0.12
    assert report.gap.calibration is None


def test_outcomes_are_learnt_beside_labels(tmp_path: Path, base: Base, store: Path, recipe: Path) -> None:
    register(store, base, "world")
    code, output = invoke("discover", recipe, "--store", store, "--prompts-per-domain", 12)
    assert code == 0, output
    output = train(recipe, store)
    assert "targets: discovered" in output
    assert "24 without an outcome" in output
    report = report_of(store)
    assert (report.targets, list(report.routers)) == (TargetKind.DISCOVERED, [TargetKind.DISCOVERED, TargetKind.LABELS])
    assert report.prompts == dict.fromkeys(DOMAINS, 12)
    assert report.unsearched_prompts == dict.fromkeys(DOMAINS, 8)
    assert report.num_train + report.num_validation == 36 + 24  # learnt, but not validated on
    counts = {evaluation.metrics.num_prompts for evaluation in report.routers.values()}
    assert counts == {report.num_validation}  # both on the same prompts
    assert report.routers[TargetKind.LABELS].label_top1 > 0.8
    assert "targets: labels" in train(recipe, store, "--targets", "labels")
    register(store, base, "world", seed=9)
    assert "run brainstacks-train discover again" in refusal("router", recipe, "--store", store)


def test_outcomes_that_are_not_there_cannot_be_wanted(
    tmp_path: Path, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    two = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2])
    assert "has no outcomes" in refusal("router", two, "--store", store, "--targets", "discovered")


def test_the_gap_is_calibrated_with_prompts_outside(
    tmp_path: Path, base: Base, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    outside = [{"prompt": f"{i}; {i * i}; {i * 7} % {i}"} for i in range(20)]
    (tmp_path / "outside.jsonl").write_text("\n".join(map(json.dumps, outside)))
    more = 'out_of_domain = "outside.jsonl"\ngap_false_alarms = 0.2'
    two = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2], more=more)
    output = train(two, store)
    report, checkpoint = report_of(store), checkpoint_of(store)
    gap = report.gap
    assert gap.calibration is not None
    assert gap.check is not None
    assert (gap.calibration.num_in_domain, gap.calibration.num_out_of_domain) == (report.num_validation, 10)
    assert (gap.check.num_in_domain, gap.check.num_out_of_domain) == (8, 10)
    assert gap.calibration.false_alarms <= 0.2
    assert checkpoint.policy.gap_threshold == gap.threshold
    assert f"gap signal: below {gap.threshold:.3f}" in output
    router = router_of(checkpoint, base)
    flagged = sum(router.route(row["prompt"]).gap for row in outside)
    assert flagged == round(10 * (gap.calibration.caught + gap.check.caught))


def test_a_file_of_prompts_outside_must_be_there(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> None:
    two = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2], more='out_of_domain = "gone.jsonl"')
    assert "router.out_of_domain: there is no file" in refusal("router", two, "--store", tmp_path / "store")


def test_a_second_training_computes_no_feature_and_comes_to_the_same_router(
    tmp_path: Path, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    two = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2])
    train(two, store)
    first, cache = StackRegistry.open(store).manifest.router, feature_cache_path(store)
    content = cache.read_bytes()
    train(two, store)
    assert cache.read_bytes() == content
    assert StackRegistry.open(store).manifest.router == first
    cache.write_bytes(b"damaged" * 100)
    assert str(cache) in refusal("router", two, "--store", store)


def test_a_domain_is_added_without_touching_the_others(
    tmp_path: Path, base: Base, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    train(write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2]), store)
    before = checkpoint_of(store)
    register(store, base, "world")
    three = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS)
    code, output = invoke("router-extend", three, "--store", store, "--domain", "world")
    assert code == 0, output
    after = checkpoint_of(store)
    assert after.network.domains == DOMAINS
    assert (after.settings, after.policy) == (before.settings, before.policy)
    assert after.stack_digests == {
        name: tuple(stack.digest for stack in StackRegistry.open(store).domain(name).stacks) for name in DOMAINS
    }
    texts = [PROMPTS[name].format(i) for name in DOMAINS for i in range(24)] + ["?", "something else"]
    old, new = router_of(before, base), router_of(after, base)
    for text in texts:
        scores = new.route(text).scores
        assert {name: scores[name] for name in DOMAINS[:2]} == old.route(text).scores
    assert new.route(PROMPTS["world"].format(30)).scores["world"] > 0.5
    assert torch.equal(before.network.global_query, after.network.global_query)
    report = read_report(report_path(store, "router_extension"), ExtensionReport)
    assert report is not None
    assert (report.domain, report.targets, report.extended.auc, report.retrained.auc) == (
        "world",
        TargetKind.LABELS,
        1.0,
        1.0,
    )
    assert report.extended.metrics.num_positive == report.retrained.metrics.num_positive > 0
    assert "world, learnt from labels" in output


def test_what_cannot_be_added_is_refused_by_name(
    tmp_path: Path, base: Base, store: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    three = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS)

    def refused(recipe: Path, domain: str) -> str:
        return refusal("router-extend", recipe, "--store", store, "--domain", domain)

    assert "has no router: train one first" in refused(three, "world")
    train(write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS[:2]), store)
    assert "the recipe has no domain 'world'; it has ['greet', 'animals']" in refused(tmp_path / "recipe.toml", "world")
    three = write_recipe(tmp_path, tiny_base_folder("llama"), DOMAINS)
    assert "lacks the domains ['world']; train them first" in refused(three, "world")
    assert "knows 'animals' already" in refused(three, "animals")
    register(store, base, "world")
    register(store, base, "animals", seed=5)
    assert "the stacks of ['animals']" in refused(three, "world")
    without = write_recipe(tmp_path, tiny_base_folder("llama"), ("greet", "world"))
    assert "knows ['animals'], which the recipe lacks" in refused(without, "world")
    assert checkpoint_of(store).network.domains == DOMAINS[:2]
