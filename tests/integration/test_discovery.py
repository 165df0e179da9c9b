"""Discovery on a tiny base: rows cost together what they cost alone, and searches find what slow ones find."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.model.base import Base, load_base
from engine.model.inject import injected
from engine.model.moe_lora import MoeLoraConfig, ServingStack
from engine.model.training_form import TrainingDeltas
from stack_store.format import pack_groups, write_stack
from stack_store.registry import StackRegistry
from tests.stacks import header_for, random_projections, random_serving_stack
from training.cli import app
from training.context import pack_of
from training.data.examples import Example, render
from training.data.records import Record
from training.discovery.candidate_losses import Row, RowLosses
from training.discovery.combinations import BASE, GreedySearch, Outcome, Search, all_combinations
from training.discovery.discovery import Progress
from training.discovery.outcomes import outcomes_path, read_outcomes
from training.discovery.report import DiscoveryReport, DiscoverySettings
from training.discovery.run import Found, FrozenDomains, search_examples
from training.errors import DiscoveryInvalid, TrainingDiverged
from training.loss import answer_loss_sum, pad
from training.reports import read_report, report_path

NAMES = ("chat", "math", "reasoning")
CONFIG = MoeLoraConfig(num_experts=4, rank=2, top_k=2)
SETTINGS = DiscoverySettings("greedy", 0.0, ("reasoning",), 8, 64)
SENTENCE = "the lazy dog jumps over the quick brown fox and says hello to the world"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")


@pytest.fixture(scope="module")
def domains(base: Base) -> dict[str, tuple[ServingStack, ...]]:
    """Three domains; the second has two rounds."""
    return {
        name: tuple(random_serving_stack(base.geometry, seed=seed) for seed in seeds)
        for name, seeds in zip(NAMES, ([1], [2, 3], [4]), strict=True)
    }


def examples_of(base: Base, count: int = 10) -> list[Example]:
    """Of different lengths, prompts and answers alike."""
    return [
        render(base.tokenizer, Record(" ".join(WORDS[: 1 + i % 7]) + f" {i}", " ".join(WORDS[i % 5 : 6 + i])))
        for i in range(count)
    ]


def slow_loss(base: Base, domains: Mapping[str, Sequence[ServingStack]], row: Row) -> tuple[float, int]:
    """One row at a time, by the one loss of training."""
    names = [name for name in domains if row.weights.get(name)]
    deltas = TrainingDeltas()
    deltas.use_frozen(pack_of(names, domains), [row.weights[name] for name in names for _ in domains[name]])
    with torch.no_grad(), injected(base.sites, deltas):
        loss, tokens = answer_loss_sum(base, deltas, pad([row.example], base.device))
    return loss.item(), tokens


def mixed_rows(base: Base) -> list[Row]:
    mixes: list[dict[str, float]] = [
        *(dict.fromkeys(sorted(members), 1.0) for members in all_combinations(NAMES)),
        {"chat": 0.2, "math": 0.7},
        {"chat": 0.0, "reasoning": -0.5},
    ]
    return [Row(example, mixes[index % len(mixes)]) for index, example in enumerate(examples_of(base, 24))]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, during a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("max_tokens", [1, 100, 5000])
def test_rows_of_any_batch_cost_what_each_costs_alone(
    architecture: str, max_tokens: int, threads: int, tiny_base_folder: Callable[[str], Path]
) -> None:
    base = load_base(str(tiny_base_folder(architecture)), base_format="nf4-dense", dtype="float32")
    domains = {name: [random_serving_stack(base.geometry, seed=seed)] for seed, name in enumerate(NAMES)}
    rows = mixed_rows(base)
    losses = RowLosses(base, domains, max_tokens=max_tokens, max_packs=2).measure(rows)
    for row, loss in zip(rows, losses, strict=True):
        slow_sum, tokens = slow_loss(base, domains, row)
        assert loss.tokens == tokens == row.example.answer_length
        assert loss.loss_sum == pytest.approx(slow_sum, rel=1e-5)
        assert loss.mean == pytest.approx(slow_sum / tokens, rel=1e-5)
    assert torch.get_num_threads() == threads


def test_a_batch_of_the_base_alone_needs_no_stack(base: Base, domains: Mapping[str, Sequence[ServingStack]]) -> None:
    rows = [Row(example, {}) for example in examples_of(base)]
    alone = RowLosses(base, {}, max_tokens=200).measure(rows)
    assert alone == RowLosses(base, domains, max_tokens=200).measure(
        [replace(row, weights={"math": 0}) for row in rows]
    )
    assert all(
        loss.loss_sum == pytest.approx(slow_loss(base, {}, row)[0]) for loss, row in zip(alone, rows, strict=True)
    )


def test_a_mix_whose_loss_is_not_finite_is_named(base: Base, domains: Mapping[str, Sequence[ServingStack]]) -> None:
    broken = random_serving_stack(base.geometry, seed=9)
    for group in broken.groups().values():
        group.a_and_gate.fill_(float("inf"))
    first, second = examples_of(base, 2)
    with pytest.raises(TrainingDiverged, match=r"\{'law': 1.0\} is nan"):
        RowLosses(base, {**domains, "law": [broken]}, max_tokens=5000).measure(
            [Row(first, {"chat": 1.0}), Row(second, {"law": 1.0})]
        )


def test_a_domain_that_is_not_there_is_refused_by_name(base: Base) -> None:
    with pytest.raises(ValueError, match="law"):
        RowLosses(base, {}, max_tokens=100).measure([Row(examples_of(base, 1)[0], {"law": 1.0})])


def search(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], cache: Path, *, names: str = "abc", **changes: Any
) -> Found:
    digests = {name: (letter * 64,) for name, letter in zip(NAMES, names, strict=True)}
    arguments: dict[str, Any] = {"settings": SETTINGS, "max_tokens": 300} | changes
    return search_examples(
        examples_of(base), base=base, domains=FrozenDomains(domains, digests), cache=cache, **arguments
    )


def slow_outcome(base: Base, domains: Mapping[str, Sequence[ServingStack]], example: Example) -> Outcome:
    """One search, one row at a time."""
    one: Search = GreedySearch(NAMES, threshold=0.0, soft_domains=["reasoning"], also=[frozenset(NAMES)])
    while one.wanted:
        rows = {tried: Row(example, dict.fromkeys(tried, 1.0)) for tried in one.wanted}
        sums = {tried: slow_loss(base, domains, row) for tried, row in rows.items()}
        one.take({tried: loss / tokens for tried, (loss, tokens) in sums.items()})
    return one.outcome


def test_many_searches_at_once_find_what_each_finds_alone(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    found = search(base, domains, tmp_path / "losses.sqlite").outcomes
    for example, outcome in zip(examples_of(base), found, strict=True):
        slow = slow_outcome(base, domains, example)
        assert (outcome.best, outcome.soft) == (slow.best, slow.soft)
        assert outcome.losses == pytest.approx(slow.losses, rel=1e-5)
    assert len({outcome.best for outcome in found}) > 2
    assert max(len(outcome.best) for outcome in found) > 1


@pytest.mark.parametrize("window", [1, 3])
def test_how_many_are_searched_at_once_changes_nothing_but_the_last_bits(
    window: int, base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    whole = search(base, domains, tmp_path / "whole.sqlite").outcomes
    parts = search(base, domains, tmp_path / "parts.sqlite", window=window).outcomes
    for one, other in zip(whole, parts, strict=True):
        assert (one.best, one.soft) == (other.best, other.soft)
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_exhaustive_search_measures_every_combination(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    found = search(base, domains, tmp_path / "losses.sqlite", settings=replace(SETTINGS, search="exhaustive"))
    assert found.rows_measured == 8 * len(found.outcomes)
    for outcome in found.outcomes:
        assert list(outcome.losses) == list(all_combinations(NAMES))
        assert outcome.losses[outcome.best] == min(outcome.losses.values())


def test_a_second_run_measures_nothing_and_a_changed_stack_only_what_contains_it(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    cache = tmp_path / "losses.sqlite"
    first, second = (search(base, domains, cache) for _ in range(2))
    assert (second.rows_measured, second.rows_from_cache) == (0, first.rows_measured)
    assert second.outcomes == first.outcomes
    changed = search(base, domains, cache, names="abd")
    with_it = [tried for outcome in first.outcomes for tried in outcome.losses if "reasoning" in tried]
    assert changed.rows_measured == len(with_it)
    for one, other in zip(changed.outcomes, first.outcomes, strict=True):
        assert one.best == other.best
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    whole = search(base, domains, tmp_path / "whole.sqlite")
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(base, domains, tmp_path / "losses.sqlite", on_progress=stop)
    rest = search(base, domains, tmp_path / "losses.sqlite")
    assert rest.outcomes == whole.outcomes
    assert rest.rows_from_cache == seen[-1].rows_measured > 0
    assert rest.rows_measured == whole.rows_measured - rest.rows_from_cache > 0


def test_progress_counts_examples_and_rows(
    base: Base, domains: Mapping[str, Sequence[ServingStack]], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    found = search(base, domains, tmp_path / "losses.sqlite", window=4, on_progress=seen.append)
    assert sorted({progress.done for progress in seen}) == [0, 4, 8, 10]
    assert seen[-1] == Progress(10, 10, found.rows_measured, 0)
    assert all(one.rows_measured <= other.rows_measured for one, other in pairwise(seen))


@pytest.fixture
def recipe(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> Path:
    for domain in NAMES:
        lines = [{"instruction": f"{domain} number {i} please", "output": " ".join(WORDS[i % 5 :])} for i in range(12)]
        lines[3]["instruction"] = f"{domain} " * 100
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = [f'[[domains]]\nname = "{name}"\nfiles = ["{name}.jsonl"]\nheld_out = 2\n' for name in NAMES]
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[base]\nspec = "{tiny_base_folder("llama")}"\ndtype = "float32"\n'
        "[training]\nmax_example_tokens = 120\ntokens_per_step = 500\n"
        "[discovery]\nthreshold = 0.0\n" + "".join(parts)
    )
    return path


@pytest.fixture
def store(tmp_path: Path, base: Base) -> Path:
    path = tmp_path / "store"
    StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry).close()
    for seed, name in enumerate(NAMES):
        register(path, base, name, seed=seed)
    return path


def register(store: Path, base: Base, name: str, *, seed: int) -> None:
    header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=name)
    projections = random_projections(base.geometry, CONFIG, seed=seed, size=0.05)
    write_stack(store / f"{name}.safetensors", header, pack_groups(header, projections))
    registry = StackRegistry.open(store)
    registry.register_domain(name, [store / f"{name}.safetensors"])
    registry.close()


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_writes_outcomes_and_a_report_that_agree(recipe: Path, store: Path, base: Base) -> None:
    assert read_outcomes(store) is None
    code, output = invoke("discover", recipe, "--store", store, "--prompts-per-domain", 6)
    assert code == 0, output
    report = read_report(report_path(store, "discovery"), DiscoveryReport)
    stored = read_outcomes(store)
    assert report is not None
    assert stored is not None
    assert stored.domains == NAMES
    assert report.settings == DiscoverySettings("greedy", 0.0, ("reasoning",), 6, 120)
    assert sum(found.cut for found in report.labels.values()) >= 1
    assert len(stored.outcomes) == 18
    for label, found in report.labels.items():
        mine = [line.outcome for line in stored.outcomes if line.label == label]
        assert (found.prompts, sum(found.wins.values())) == (6, 6)
        assert found.shares == {name: sum(name in outcome.best for outcome in mine) / 6 for name in NAMES}
        means = {
            mode: sum(outcome.losses[tried] for outcome in mine) / 6
            for mode, tried in (("base", BASE), ("label", frozenset({label})), ("ungated", frozenset(NAMES)))
        }
        best = sum(outcome.losses[outcome.best] for outcome in mine) / 6
        assert found.losses.prompt_mean == pytest.approx(means | {"best": best})
        for mode, saved in found.losses.saving.items():
            assert saved.mean == pytest.approx(means[mode] - best)
            assert saved.low <= saved.mean <= saved.high
        assert re.search(rf"{label} .* 6 ", output)
    assert "lazy dog" not in outcomes_path(store).read_text()
    prompt = next(line for line in map(json.loads, (recipe.parent / "chat.jsonl").read_text().splitlines()))
    assert len(stored.of_prompt("chat", prompt["instruction"])) <= 1
    measured = report.rows_measured
    assert invoke("discover", recipe, "--store", store, "--prompts-per-domain", 6)[0] == 0
    again = read_report(report_path(store, "discovery"), DiscoveryReport)
    assert again is not None
    assert (again.rows_measured, again.rows_from_cache) == (0, measured)
    assert (again.labels, again.outcomes_sha256) == (report.labels, report.outcomes_sha256)


def test_outcomes_of_other_stacks_are_refused_by_name(recipe: Path, store: Path, base: Base) -> None:
    assert invoke("discover", recipe, "--store", store, "--prompts-per-domain", 1)[0] == 0
    register(store, base, "law", seed=7)
    assert read_outcomes(store) is not None
    register(store, base, "math", seed=8)
    with pytest.raises(DiscoveryInvalid, match=r"\['math'\].*discover again"):
        read_outcomes(store)


def test_outcomes_that_are_not_the_reports_are_refused_by_name(recipe: Path, store: Path) -> None:
    assert invoke("discover", recipe, "--store", store, "--prompts-per-domain", 1)[0] == 0
    path = outcomes_path(store)
    path.write_text(path.read_text().replace('"soft": []', '"soft": ["chat"]', 1) + "\n")
    with pytest.raises(DiscoveryInvalid, match=str(path)):
        read_outcomes(store)


def test_a_domain_that_the_store_lacks_and_a_damaged_cache_are_named(recipe: Path, store: Path) -> None:
    cache = store / "training" / "discovery.sqlite"
    cache.parent.mkdir()
    cache.write_bytes(b"no database" * 100)
    code, output = invoke("discover", recipe, "--store", store)
    assert (code, str(cache) in output) == (1, True)
    registry = StackRegistry.open(store)
    registry.remove_domain("math")
    registry.close()
    code, output = invoke("discover", recipe, "--store", store)
    assert code == 1
    assert "math" in output


def test_a_domain_without_anything_to_search_is_named(recipe: Path, store: Path) -> None:
    recipe.write_text(recipe.read_text().replace("max_example_tokens = 120", "max_example_tokens = 10"))
    code, output = invoke("discover", recipe, "--store", store)
    assert code == 1
    assert "'chat' has nothing to search" in output
