"""Evaluation on a tiny base: each mode's loss is what a slow measurement finds, and a run goes on where one stopped."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from engine.model.base import Base, load_base
from engine.model.inject import injected
from engine.model.training_form import TrainingDeltas
from router.policy import RoutingPolicy
from stack_store.registry import StackRegistry
from tests.evaluation_stores import DOMAINS, make_evaluation_store, write_domain, write_recipe, write_router
from training.cli import app
from training.context import pack_of
from training.data.examples import Example
from training.discovery.candidate_losses import Row, RowLosses
from training.discovery.combinations import all_combinations
from training.discovery.row_loss import RowLoss
from training.errors import EvaluationInvalid, TrainingError
from training.evaluating.finished import Finished
from training.evaluating.held_out import HeldOut, RecordLosses, held_out_examples, measure_held_out
from training.evaluating.modes import MODES, Mode, read_modes
from training.evaluating.plan import Plan
from training.evaluating.report import EvaluationReport
from training.evaluating.run import evaluate_store
from training.evaluating.subject import Mix, Subject, open_subject
from training.evaluation import mean_answer_loss
from training.loss import answer_loss_sum, pad
from training.recipe import Recipe, read_recipe
from training.reports import read_report
from training.workers import Workers

FLOOR = {"chat": 0.2}


@pytest.fixture(scope="module")
def base_folder(tiny_base_folder: Callable[[str], Path]) -> Path:
    return tiny_base_folder("llama")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return load_base(str(base_folder), base_format="nf4-dense", dtype="float32")


@pytest.fixture(scope="module")
def shared_store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_evaluation_store(tmp_path_factory.mktemp("store"), base)


@pytest.fixture(scope="module")
def subject(base: Base, shared_store: Path) -> Subject:
    return open_subject(base, shared_store, RoutingPolicy())


@pytest.fixture(scope="module")
def recipe_path(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), base_folder)


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return read_recipe(recipe_path)


@pytest.fixture(scope="module")
def held_out(recipe: Recipe, base: Base) -> HeldOut:
    return held_out_examples(recipe, base.tokenizer, limit=None)


def slow_loss(subject: Subject, example: Example, mix: Mix) -> float:
    """One record at a time, by the one loss of training."""
    names = [name for name in subject.stacks if mix.get(name)]
    deltas = TrainingDeltas()
    deltas.use_frozen(pack_of(names, subject.stacks), [mix[name] for name in names for _ in subject.stacks[name]])
    with torch.no_grad(), injected(subject.base.sites, deltas):
        return answer_loss_sum(subject.base, deltas, pad([example], subject.base.device))[0].item()


def measure(
    subject: Subject, held_out: HeldOut, folder: Path, modes: tuple[Mode, ...] = MODES, max_tokens: int = 300
) -> list[RecordLosses]:
    with Finished(folder / "finished.sqlite") as finished:
        return measure_held_out(subject, held_out, modes, finished=finished, store=folder, max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 300])
def test_every_mode_is_measured_with_its_own_mix(
    subject: Subject, held_out: HeldOut, tmp_path: Path, max_tokens: int
) -> None:
    records = measure(subject, held_out, tmp_path, max_tokens=max_tokens)
    assert subject.router is not None
    for labelled, record in zip(held_out.examples, records, strict=True):
        routed = subject.router.route(labelled.prompt).mix
        mixes: dict[Mode, Mix] = {
            "base": {},
            "label": {**FLOOR, labelled.label: 1.0},
            "ungated": dict.fromkeys(DOMAINS, 1.0),
            "routed": routed,
        }
        assert (record.domain, record.prompt_sha256) == (labelled.label, labelled.prompt_sha256)
        assert record.answer_tokens == labelled.example.answer_length
        assert record.routed_mix == routed
        for mode, mix in mixes.items():
            assert record.loss_sums[mode] == pytest.approx(slow_loss(subject, labelled.example, mix), rel=1e-5), mode


def test_the_oracle_is_the_best_combination_that_was_tried(subject: Subject, held_out: HeldOut, tmp_path: Path) -> None:
    for labelled, record in zip(held_out.examples, measure(subject, held_out, tmp_path), strict=True):
        assert record.oracle is not None
        chosen = {} if record.oracle == "base" else dict.fromkeys(record.oracle.split("+"), 1.0)
        by_combination = {
            combination: slow_loss(subject, labelled.example, dict.fromkeys(combination, 1.0))
            for combination in all_combinations(DOMAINS)
        }
        found = record.loss_sums["oracle"]
        assert found == pytest.approx(by_combination[frozenset(chosen)], rel=1e-5)
        assert found >= min(by_combination.values()) - 1e-4
        singles = [loss for combination, loss in by_combination.items() if len(combination) <= 1]
        assert found <= min(*singles, by_combination[frozenset(DOMAINS)]) + 1e-4


def test_the_bases_mean_is_that_of_training(
    subject: Subject, held_out: HeldOut, recipe: Recipe, base: Base, shared_store: Path, tmp_path: Path
) -> None:
    plan = Plan(modes=("base",))
    report = evaluate_store(recipe, base, shared_store, tmp_path, plan)
    assert report.held_out is not None
    for domain in DOMAINS:
        examples = [labelled.example for labelled in held_out.examples if labelled.label == domain]
        with injected(base.sites, TrainingDeltas()):
            expected = mean_answer_loss(base, TrainingDeltas(), examples, max_tokens=300, workers=Workers())
        summary = report.held_out.domains[domain]
        assert summary.losses["base"].value == pytest.approx(expected, rel=1e-6)
        assert summary.losses["base"].low < expected < summary.losses["base"].high
        assert (summary.records, summary.answer_tokens) == (len(examples), sum(e.answer_length for e in examples))
        assert summary.comparisons == ()
    mean = report.held_out.mean.losses["base"].value
    assert mean == pytest.approx(sum(s.losses["base"].value for s in report.held_out.domains.values()) / 3)


def test_nothing_is_measured_twice_and_a_changed_stack_only_where_it_takes_part(
    subject: Subject, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(subject, held_out, tmp_path)
    measured: list[Mapping[str, float]] = []

    def watch(self: RowLosses, rows: Sequence[Row]) -> list[RowLoss]:
        measured.extend(row.weights for row in rows)
        return original(self, rows)

    original = RowLosses.measure_batch
    monkeypatch.setattr(RowLosses, "measure_batch", watch)
    assert measure(subject, held_out, tmp_path) == first
    assert measured == []
    changed = replace(subject, digests={**subject.digests, "reasoning": ("f" * 64,)})
    again = measure(changed, held_out, tmp_path)
    assert [record.loss_sums["base"] for record in again] == [record.loss_sums["base"] for record in first]
    assert measured
    assert all(mix.get("reasoning") for mix in measured)


def test_a_killed_run_goes_on(subject: Subject, held_out: HeldOut, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if name == "held-out loss" and done > total // 2:
            raise Killed

    def run(on_progress: Callable[[str, int, int], None]) -> list[RecordLosses]:
        with Finished(tmp_path / "finished.sqlite") as finished:
            return measure_held_out(
                subject, held_out, MODES, finished=finished, store=tmp_path, max_tokens=100, on_progress=on_progress
            )

    seen: list[tuple[str, int, int]] = []
    with pytest.raises(Killed):
        run(kill)
    records = run(lambda *at: seen.append(at))
    first = next(at for at in seen if at[0] == "held-out loss")
    assert first[1] > first[2] // 2
    for record, whole in zip(records, measure(subject, held_out, tmp_path / "other", max_tokens=100), strict=True):
        assert record.loss_sums == pytest.approx(whole.loss_sums, rel=1e-5)


def test_records_that_are_too_long_are_counted_and_a_limit_takes_the_first(recipe: Recipe, base: Base) -> None:
    lengths = sorted(
        len(labelled.example.token_ids) for labelled in held_out_examples(recipe, base.tokenizer, limit=None).examples
    )
    section = recipe.settings.training.model_copy(update={"max_example_tokens": lengths[-2]})
    shorter = replace(recipe, settings=recipe.settings.model_copy(update={"training": section}))
    some = held_out_examples(shorter, base.tokenizer, limit=None)
    assert sum(some.too_long.values()) == len(lengths) - len(some.examples) >= 1
    section = section.model_copy(update={"max_example_tokens": 5})
    none = replace(recipe, settings=recipe.settings.model_copy(update={"training": section}))
    with pytest.raises(EvaluationInvalid, match="none of the 4 held-out records of 'chat' fits 5 tokens"):
        held_out_examples(none, base.tokenizer, limit=None)
    everything = held_out_examples(recipe, base.tokenizer, limit=None).examples
    limited = held_out_examples(recipe, base.tokenizer, limit=2).examples
    by_domain = [[labelled for labelled in everything if labelled.label == domain][:2] for domain in DOMAINS]
    assert list(limited) == [labelled for of_domain in by_domain for labelled in of_domain]


def test_the_command_writes_what_it_measured(recipe_path: Path, base: Base, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="benchmarks need the extra eval")
    store = make_evaluation_store(tmp_path, base)
    data = Path(__file__).parents[1] / "data" / "benchmarks"
    arguments = ["evaluate", str(recipe_path), "--store", str(store), "--data", str(data), "--limit", "3"]
    result = CliRunner().invoke(app, [*arguments, "--tasks", "hellaswag, arc_easy"])
    assert result.exit_code == 0, result.output
    report = read_report(store / "reports" / "evaluation.json", EvaluationReport)
    assert report is not None
    assert report.held_out is not None
    assert (report.modes, report.limit, report.notes) == (MODES, 3, ())
    assert set(report.benchmarks) == {"hellaswag", "arc_easy"}
    assert set(report.versions) == {"torch", "transformers", "lm_eval"}
    assert report.held_out.mean.routed_to_label is not None
    losses = report.held_out.mean.losses
    assert report.held_out.mean.routed_to_label.value == pytest.approx(losses["routed"].value / losses["label"].value)
    assert [c.other for c in report.held_out.mean.comparisons] == ["base", "ungated", "label", "oracle"]
    for comparison in report.held_out.mean.comparisons:
        assert comparison.difference.value == pytest.approx(losses["routed"].value - losses[comparison.other].value)
    text = (store / "reports" / "evaluation.md").read_text()
    assert f"| {report.held_out.mean.losses['routed'].value:.3f} [" in text
    assert "| hellaswag | acc_norm | 3 |" in text
    lines = (store / "reports" / "evaluation_records.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert set(json.loads(lines[0])) >= {"domain", "loss_sums", "routed_mix", "oracle"}
    again = CliRunner().invoke(app, [*arguments, "--tasks", "hellaswag,arc_easy"])
    assert again.exit_code == 0
    repeated = read_report(store / "reports" / "evaluation.json", EvaluationReport)
    assert repeated is not None
    assert replace(repeated, seconds=0.0) == replace(report, seconds=0.0)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--modes", "base,gated"], "there is no mode 'gated'; the modes are"),
        (["--tasks", "gsm8k"], "need the folder of their files: --data"),
        (["--no-held-out"], "nothing to measure"),
        (["--data", ".", "--modes", "oracle"], "mode 'oracle' is defined for held-out loss only"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe_path: Path, shared_store: Path, options: list[str], fault: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(recipe_path), "--store", str(shared_store), *options])
    assert result.exit_code == 1
    assert fault in result.stderr


def test_without_the_harness_the_extra_is_named(
    recipe: Recipe, base: Base, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.startswith(("lm_eval", "training.evaluating.bench", "training.evaluating.harn"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TrainingError, match=r"pip install -c constraints.txt -e '\.\[eval\]'"):
        evaluate_store(recipe, base, shared_store, tmp_path, Plan(modes=("base",), data=tmp_path))


def test_a_store_without_a_router_is_measured_in_the_other_modes(recipe: Recipe, base: Base, tmp_path: Path) -> None:
    registry = StackRegistry.create(tmp_path / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
    for seed, domain in enumerate(DOMAINS):
        write_domain(registry, base, tmp_path, domain, seed=seed)
    registry.close()
    with pytest.raises(EvaluationInvalid, match="mode 'routed' needs a router"):
        evaluate_store(recipe, base, tmp_path / "store", tmp_path, Plan())
    report = evaluate_store(recipe, base, tmp_path / "store", tmp_path, Plan(modes=("base", "label"), limit=2))
    assert report.router_digest is None
    assert report.held_out is not None
    assert set(report.held_out.mean.losses) == {"base", "label"}


def test_a_router_of_other_stacks_and_domains_is_said_so(base: Base, tmp_path: Path) -> None:
    store = make_evaluation_store(tmp_path, base)
    with_all = StackRegistry.open(store)
    write_domain(with_all, base, tmp_path, "math", seed=9)
    with_all.remove_domain("reasoning")
    write_domain(with_all, base, tmp_path, "law", seed=8)
    with_all.close()
    subject = open_subject(base, store, RoutingPolicy())
    stale, gone, unknown = subject.notes
    assert "other stacks of ['math']" in stale
    assert "knows ['reasoning'], which the store lacks" in gone
    assert "does not know ['law']" in unknown
    with_all = StackRegistry.open(store)
    write_router(with_all, base, tmp_path)
    with_all.close()
    assert open_subject(base, store, RoutingPolicy()).notes == ()


def test_modes_keep_their_order() -> None:
    assert read_modes(["routed", "base", "routed"]) == ("base", "routed")
    assert read_modes([]) == MODES
