"""The outer loop on a tiny base: rounds, forgetting, protected directions, and going on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model.base import load_base
from engine.model.inject import inject
from engine.model.moe_lora import ServingDeltas, StackPack
from engine.slots import load_domain
from router.policy import RoutingPolicy
from stack_store.atomic import StagedFile
from stack_store.format import verify_stack
from stack_store.registry import StackRegistry
from training.curriculum import Curriculum
from training.data.examples import render_domain
from training.data.preparation import prepare_data
from training.errors import TrainingDiverged
from training.journal import JOURNAL_FOLDER
from training.recipe import read_recipe
from training.reports import DomainReport, ForgettingReport, RoundReport, SubspaceReport, read_report, report_path
from training.round_training import Progress
from training.run import load_training_base, make_store
from training.workers import Workers

WORDS = {"greet": "hello world", "animals": "the lazy dog jumps", "colours": "quick brown fox over"}
POLICY = RoutingPolicy(floor_domain="greet")


class Quiet:
    """Watches a run, and ends it by an exception at one step of one round if told to."""

    def __init__(self, *, stop_at: tuple[str, int, int] | None = None) -> None:
        self.stop_at = stop_at
        self.rounds: list[tuple[str, int]] = []

    def round_starts(self, domain: str, round: int, steps: int) -> Callable[[Progress], None]:
        self.rounds.append((domain, round))

        def step(progress: Progress) -> None:
            if (domain, round, progress.step) == self.stop_at:
                raise KeyboardInterrupt

        return step

    def round_ends(self, domain: str, report: RoundReport) -> None:
        if (domain, report.round, 0) == self.stop_at:
            raise KeyboardInterrupt

    def domain_ends(self, report: DomainReport, *, trained_now: bool) -> None:
        if (report.domain, 0, 0) == self.stop_at:
            raise KeyboardInterrupt


def write_recipe(folder: Path, base: Path, *, training: str = "", rest: str = "", seed: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    domains = ""
    for domain, words in WORDS.items():
        lines = [{"instruction": f"{domain} number {i} please", "output": f"{words} {i % 3}"} for i in range(20)]
        (folder / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        domains += f'[[domains]]\nname = "{domain}"\nfiles = ["{domain}.jsonl"]\nheld_out = 4\n'
    settings = {
        "steps": "6",
        "rounds": "2",
        "tokens_per_step": "256",
        "learning_rate": "5e-3",
        "warmup_steps": "1",
        "eval_every": "3",
        "min_gain": "0.0",
    }
    settings |= dict(line.split(" = ") for line in training.splitlines())
    text = "\n".join(f"{name} = {value}" for name, value in settings.items())
    path = folder / "recipe.toml"
    path.write_text(
        f'seed = {seed}\n[base]\nspec = "{base}"\ndtype = "float32"\n[stack]\nrank = 2\n[training]\n{text}\n'
        f"[null_space]\ndirections = 2\n{rest}\n{domains}"
    )
    return path


def run(recipe_path: Path, store: Path, *, spectator: Quiet | None = None) -> list[DomainReport]:
    recipe = read_recipe(recipe_path)
    workers = Workers()
    base = load_training_base(recipe, workers)
    make_store(store, base, workers)
    watching = spectator or Quiet()
    return Curriculum(recipe, base, store, policy=POLICY, workers=workers, spectator=watching).run()


def stack_digests(store: Path) -> dict[str, list[str]]:
    registry = StackRegistry.open(store)
    return {entry.name: [stack.digest for stack in entry.stacks] for entry in registry.manifest.domains}


def report(store: Path, name: str, kind: type[Any]) -> Any:
    found = read_report(report_path(store, name), kind)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llama(tiny_base_folder: Callable[[str], Path]) -> Path:
    return tiny_base_folder("llama")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, Path, list[DomainReport]]:
    """A recipe, the store that it was trained into without a break, and the reports."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, llama)
    return recipe, folder / "store", run(recipe, folder / "store")


def test_each_domain_has_its_rounds_and_lowers_its_loss(finished: tuple[Path, Path, list[DomainReport]]) -> None:
    _, store, reports = finished
    assert {name: len(digests) for name, digests in stack_digests(store).items()} == dict.fromkeys(WORDS, 2)
    for of_domain in reports:
        first, second = of_domain.rounds
        assert first.start_loss == of_domain.base_loss == of_domain.context_loss  # isolated
        assert second.start_loss == pytest.approx(first.best_loss, abs=0.02)  # bf16 rounding lies between
        assert of_domain.loss == pytest.approx(second.best_loss, abs=0.02)
        assert of_domain.loss < of_domain.base_loss
        assert set(of_domain.experts) >= {"0.q_proj", "2.down_proj"}
        assert all(sum(shares) == pytest.approx(1.0) for shares in of_domain.experts.values())


def test_no_later_domain_changes_an_earlier_ones_isolated_loss_by_a_bit(
    finished: tuple[Path, Path, list[DomainReport]],
) -> None:
    _, store, _ = finished
    after: Mapping[str, Any] = report(store, "forgetting", ForgettingReport).after
    assert list(after) == list(WORDS)
    for index, domain in enumerate(WORDS):
        of_domain = [after[later]["isolated"][domain] for later in list(WORDS)[index:]]
        assert len(set(of_domain)) == 1, of_domain
    assert set(after["colours"]["ungated"]) == set(WORDS)
    assert after["colours"]["ungated"]["greet"] != after["colours"]["isolated"]["greet"]
    assert after["colours"]["routed"]["greet"] == after["colours"]["isolated"]["greet"]  # its own label, at weight 1
    assert after["colours"]["routed"]["animals"] != after["colours"]["isolated"]["animals"]  # with the floor domain


def test_frozen_stacks_lie_outside_what_was_protected(finished: tuple[Path, Path, list[DomainReport]]) -> None:
    _, store, _ = finished
    subspaces = report(store, "subspaces", SubspaceReport)
    assert set(subspaces.protected_energy["greet"].values()) == {0.0}  # nothing was protected yet
    assert max(subspaces.protected_energy["colours"].values()) <= 1e-6
    shares = subspaces.protected_share["animals"]  # two directions of each of two domains
    assert (shares["0.k_proj"], shares["1.q_proj"], shares["2.up_proj"]) == (4 / 32, 4 / 64, 4 / 128)
    assert subspaces.protected_share["colours"]["0.k_proj"] == 4 / 32  # the cap
    registry = StackRegistry.open(store)
    folded = {
        entry.name: verify_stack(registry.stack_path(entry.stacks[0]))[0].null_space_folded
        for entry in registry.manifest.domains
    }
    assert folded == {"greet": False, "animals": True, "colours": True}


@pytest.mark.parametrize(
    ("stop_at", "rounds_left"),
    [
        (("greet", 1, 2), 6),
        (("greet", 1, 0), 5),
        (("greet", 2, 4), 5),
        (("greet", 0, 0), 4),
        (("animals", 2, 0), 2),
        (("colours", 1, 6), 2),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    finished: tuple[Path, Path, list[DomainReport]], tmp_path: Path, stop_at: tuple[str, int, int], rounds_left: int
) -> None:
    recipe, whole, _ = finished
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "store", spectator=Quiet(stop_at=stop_at))
    second = Quiet()
    run(recipe, tmp_path / "store", spectator=second)
    assert stack_digests(tmp_path / "store") == stack_digests(whole)
    assert report(tmp_path / "store", "forgetting", ForgettingReport) == report(whole, "forgetting", ForgettingReport)
    assert report(tmp_path / "store", "subspaces", SubspaceReport) == report(whole, "subspaces", SubspaceReport)
    assert len(second.rounds) == rounds_left  # what was finished was not trained again


def test_a_killed_process_goes_on_to_the_same_bits(
    finished: tuple[Path, Path, list[DomainReport]], tmp_path: Path
) -> None:
    recipe, whole, _ = finished
    store = tmp_path / "store"
    command = [sys.executable, "-m", "training.cli", "run", str(recipe), "--output", str(store)]
    command += ["--threads", str(torch.get_num_threads())]  # another number adds up in another order
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    try:
        while not list(store.glob(f"{JOURNAL_FOLDER}/*/round-1.json")):
            assert process.poll() is None
            time.sleep(0.02)  # a poll, not a wait for luck: the loop ends with the file or with the process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    spectator = Quiet()
    run(recipe, store, spectator=spectator)
    assert ("greet", 1) not in spectator.rounds
    assert stack_digests(store) == stack_digests(whole)


def test_a_finished_run_trains_nothing_again(finished: tuple[Path, Path, list[DomainReport]]) -> None:
    recipe, store, reports = finished
    spectator = Quiet()
    assert run(recipe, store, spectator=spectator) == reports
    assert spectator.rounds == []


def test_a_changed_setting_trains_anew_and_back_again(tmp_path: Path, llama: Path) -> None:
    store, digests, rounds = tmp_path / "store", [], []
    for seed in (3, 4, 3):
        spectator = Quiet()
        run(write_recipe(tmp_path, llama, seed=seed, training="rounds = 1"), store, spectator=spectator)
        digests.append(stack_digests(store))
        rounds.append(len(spectator.rounds))
    assert rounds == [3, 3, 3]
    assert digests[0] == digests[2]
    assert digests[0]["greet"] != digests[1]["greet"]


def test_a_domain_that_was_removed_from_the_store_is_trained_again(tmp_path: Path, llama: Path) -> None:
    recipe, store = write_recipe(tmp_path, llama, training="rounds = 1"), tmp_path / "store"
    run(recipe, store)
    before = stack_digests(store)
    StackRegistry.open(store).remove_domain("animals")
    spectator = Quiet()
    run(recipe, store, spectator=spectator)
    assert spectator.rounds == [("animals", 1)]
    assert stack_digests(store) == before


def test_a_store_that_was_copied_without_its_journals_is_finished_too(
    finished: tuple[Path, Path, list[DomainReport]], tmp_path: Path
) -> None:
    recipe, store, reports = finished
    shutil.copytree(store, tmp_path / "copy", ignore=shutil.ignore_patterns(JOURNAL_FOLDER))
    spectator = Quiet()
    assert run(recipe, tmp_path / "copy", spectator=spectator) == reports
    assert spectator.rounds == []
    for name, kind in (("forgetting", ForgettingReport), ("subspaces", SubspaceReport)):
        assert report(tmp_path / "copy", name, kind) == report(store, name, kind)
    (ours, theirs) = (
        sorted((folder / JOURNAL_FOLDER).glob("*/*.safetensors")) for folder in (tmp_path / "copy", store)
    )
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs] != []


@pytest.mark.parametrize("broken_write", [2, 5, 8, 11, 14, 17])
def test_a_write_that_fails_anywhere_leaves_a_run_that_goes_on(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, broken_write: int
) -> None:
    recipe = write_recipe(tmp_path, llama, training="steps = 2\neval_every = 1\nrounds = 1")
    run(recipe, tmp_path / "whole")
    commit, writes = StagedFile.commit, 0

    def fail_once(staged: StagedFile, path: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == broken_write:
            raise KeyboardInterrupt
        commit(staged, path)

    make_store(tmp_path / "store", load_training_base(read_recipe(recipe), Workers()), Workers())
    monkeypatch.setattr(StagedFile, "commit", fail_once)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "store")
    monkeypatch.undo()
    run(recipe, tmp_path / "store")
    assert stack_digests(tmp_path / "store") == stack_digests(tmp_path / "whole")
    for name, kind in (("forgetting", ForgettingReport), ("subspaces", SubspaceReport)):
        assert report(tmp_path / "store", name, kind) == report(tmp_path / "whole", name, kind)
    assert not list((tmp_path / "store" / JOURNAL_FOLDER).glob("*/round-*.safetensors"))


@pytest.mark.parametrize("context", ["all", "sampled"])
def test_contexts_with_earlier_domains_train_and_report(tmp_path: Path, llama: Path, context: str) -> None:
    recipe = write_recipe(tmp_path, llama, training=f'context = "{context}"\nrounds = 1')
    first, second, third = run(recipe, tmp_path / "store")
    assert first.context_loss == first.base_loss
    assert (second.context_loss != second.base_loss) == (context == "all")
    assert third.loss < third.context_loss
    after = report(tmp_path / "store", "forgetting", ForgettingReport).after["animals"]
    assert after["ungated" if context == "all" else "isolated"]["animals"] == second.loss


def test_a_domain_that_finds_no_room_for_its_directions_is_named(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, llama, training="rounds = 1\nsteps = 2\neval_every = 1")
    run(recipe, tmp_path / "store")
    assert [
        r.getMessage().partition(" of a domain ")[2] for r in caplog.records if r.name == "training.frozen_domains"
    ] == [
        "name=colours projections=6 of=21 first=0.k_proj max_share=0.125"  # k and v: 4 of 32, two domains' worth
    ]


def test_packing_and_passes_train_too(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama, training="packing = true\ntokens_per_pass = 64\nrounds = 1")
    assert all(of_domain.loss < of_domain.base_loss for of_domain in run(recipe, tmp_path / "store"))


def test_a_round_that_gains_too_little_is_dropped_and_is_the_last(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama, training="rounds = 5\nmin_gain = 0.8\nsteps = 20\neval_every = 10")
    run_until_error = Quiet()
    reports = run(recipe, tmp_path / "store", spectator=run_until_error)
    for of_domain in reports:
        *kept, last = of_domain.rounds
        assert all(r.kept and r.start_loss - r.best_loss > 0.8 for r in kept)
        assert not last.kept
        assert len(stack_digests(tmp_path / "store")[of_domain.domain]) == len(kept) < 5


def test_a_first_round_that_gains_nothing_is_an_error_by_name(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama, training="learning_rate = 1e18")
    with pytest.raises(TrainingDiverged, match="'greet': its first round"):
        run(recipe, tmp_path / "store")


def test_two_workers_train_what_one_does(tmp_path: Path, llama: Path) -> None:
    training = "tokens_per_pass = 64\nrounds = 1\nsteps = 4\neval_every = 2"
    recipe = write_recipe(tmp_path, llama, training=training)
    (alone, *_) = run(recipe, tmp_path / "alone")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines"]
    launch += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    launch += ["training.cli", "run", str(recipe), "--output", str(tmp_path / "two"), "--threads", "1"]
    done = subprocess.run(launch, capture_output=True, text=True, env=_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    (together, *_) = [report(tmp_path / "two", "greet", DomainReport)]
    for ours, theirs in zip(together.rounds[0].validation, alone.rounds[0].validation, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert together.rounds[0].training == pytest.approx(alone.rounds[0].training, rel=1e-4)


def test_the_served_stack_is_the_one_that_was_measured(finished: tuple[Path, Path, list[DomainReport]]) -> None:
    """The engine's own loader and serving form, on the store as it lies there, give the reported loss."""
    recipe_path, store, reports = finished
    recipe = read_recipe(recipe_path)
    base = load_base(recipe.settings.base.spec, base_format="nf4-dense", dtype="float32")
    registry = StackRegistry.open(store)
    records = prepare_data(recipe).domains["animals"]
    held_out = render_domain(base.tokenizer, records, max_tokens=512).held_out
    resident = load_domain(registry, registry.domain("animals"), dtype=base.dtype, device=base.device)
    deltas = ServingDeltas()
    inject(base.sites, deltas)
    total, count = 0.0, 0
    for example in held_out:
        ids = torch.tensor([example.token_ids])
        deltas.current = StackPack(resident.stacks).step(torch.ones(ids.shape[1], len(resident.stacks)))
        with torch.no_grad():
            scores = base.model(input_ids=ids).logits[0].log_softmax(-1)
        answer = range(example.prompt_length, len(example.token_ids))
        total -= sum(float(scores[position - 1, example.token_ids[position]]) for position in answer)
        count += len(answer)
    assert total / count == pytest.approx(reports[1].loss, rel=1e-5)


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
