"""Variants of a recipe on a tiny base: each run is whole, goes on, and does not feel the others."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import pytest

from stack_store.registry import StackRegistry
from training.comparing import compare
from training.comparison import Comparison
from training.comparison_command import run_comparison
from training.experiment import read_experiment
from training.reports import DomainReport, RoundReport, read_report
from training.round_training import Progress
from training.workers import Workers

RUNS = [("moe_lora", 1), ("moe_lora", 2), ("single_lora", 1)]
RECIPE = """
[base]
spec = "{spec}"
dtype = "float32"
[stack]
rank = 2
[training]
steps = 4
rounds = 2
min_gain = 0.0
tokens_per_step = 256
learning_rate = 5e-3
warmup_steps = 1
eval_every = 2
[[domains]]
name = "greet"
files = ["greet.jsonl"]
[[domains]]
name = "animals"
files = ["animals.jsonl"]
"""
HEAD = """
title = "MoE-LoRA | a single one"
recipe = "recipe.toml"
seeds = [1]
overrides.domain.held_out = 4
"""
MOE = "[variants.moe_lora]\nseeds = [1, 2]\n"
SINGLE = "[variants.single_lora]\nstack = {num_experts = 1, top_k = 1, rank = 8}\n"


@dataclass(slots=True)
class Counter:
    """A spectator that counts what is trained."""

    rounds: int = 0
    killed_at: int | None = None  # the round during which the process is to end
    kept: list[str] = field(default_factory=list)

    def round_starts(self, domain: str, round: int, steps: int) -> Callable[[Progress], None]:
        self.rounds += 1
        return self._step

    def round_ends(self, domain: str, report: RoundReport) -> None: ...

    def domain_ends(self, report: DomainReport, *, trained_now: bool) -> None:
        self.kept += [] if trained_now else [report.domain]

    def _step(self, progress: Progress) -> None:
        if self.rounds == self.killed_at and progress.step == 2:
            raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Trained:
    """An experiment that was run once."""

    folder: Path
    found: Comparison
    rounds: int

    @property
    def output(self) -> Path:
        return self.folder / "runs"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def run(folder: Path, text: str, output: Path, counter: Counter | None = None) -> tuple[Comparison, Counter]:
    counter = counter or Counter()
    found = compare(read_experiment(write(folder, text)), output, workers=Workers(), watch=lambda _: counter)
    return found, counter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Callable[[str], Path]) -> Trained:
    folder = tmp_path_factory.mktemp("comparison")
    for domain, words in {"greet": "hello world", "animals": "the lazy dog jumps over the fox"}.items():
        lines = [{"instruction": f"{domain} number {i} please", "output": words} for i in range(20)]
        (folder / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "recipe.toml").write_text(RECIPE.format(spec=tiny_base_folder("llama")))
    found, counter = run(folder, HEAD + MOE + SINGLE, folder / "runs")
    return Trained(folder, found, counter.rounds)


def digests(store: Path) -> list[str]:
    """Of every stack, in order: equal digests are equal bits."""
    return [stack.digest for domain in StackRegistry.open(store).manifest.domains for stack in domain.stacks]


def test_the_numbers_are_those_of_the_stores(trained: Trained) -> None:
    assert trained.rounds == 12
    assert [(name, one.seed) for name, of in trained.found.variants.items() for one in of.runs] == RUNS
    for name, variant in trained.found.variants.items():
        for one in variant.runs:
            reports = trained.output / name / str(one.seed) / "reports"
            after = json.loads((reports / "forgetting.json").read_text())["after"]["animals"]
            subspaces = json.loads((reports / "subspaces.json").read_text())
            assert one.failure is None
            for domain, numbers in one.domains.items():
                report = json.loads((reports / f"{domain}.json").read_text())
                for key in ("base_loss", "context_loss", "loss", "seconds"):
                    assert getattr(numbers, key) == report[key]
                assert numbers.gain == report["base_loss"] - report["loss"] > 0
                for mode, losses in after.items():
                    assert getattr(numbers, mode) == losses[domain]
                assert [(r.best_loss, r.kept, r.steps) for r in numbers.rounds] == [
                    (r["best_loss"], r["kept"], r["steps_run"]) for r in report["rounds"]
                ]
                assert numbers.rounds_kept == sum(r["kept"] for r in report["rounds"])
                assert numbers.protected_energy == max(subspaces["protected_energy"][domain].values())
                shares = [share for shares in report["experts"].values() for share in shares]
                assert (numbers.least_expert_share, numbers.largest_expert_share) == (min(shares), max(shares))
            cosines = subspaces["cosines"]["animals"]["greet"].values()
            assert one.domains["greet"].mean_cosine is None
            assert one.domains["animals"].mean_cosine == pytest.approx(fmean(cosines))


def test_the_summary_is_over_the_seeds(trained: Trained) -> None:
    variant = trained.found.variants["moe_lora"]
    losses = [one.domains["animals"].loss for one in variant.runs]
    spread = variant.summary["animals"]["loss"]
    assert losses[0] != losses[1]
    assert (spread.median, spread.lowest, spread.highest) == (median(losses), min(losses), max(losses))
    assert "mean_cosine" in variant.summary["animals"]
    assert "mean_cosine" not in variant.summary["greet"]


def test_a_single_lora_trains_and_counts_its_own_parameters(trained: Trained) -> None:
    (single,) = trained.found.variants["single_lora"].runs
    shapes = StackRegistry.open(trained.output / "single_lora" / "1").manifest.geometry.shapes
    assert single.domains["greet"].loss < single.domains["greet"].base_loss
    assert single.domains["greet"].largest_expert_share == 1.0
    assert single.domains["greet"].near_uniform_experts == 1.0
    assert single.domains["greet"].parameters == sum(3 * 8 * (i + o) for i, o in shapes.values())
    assert trained.found.variants["moe_lora"].runs[0].domains["greet"].parameters == sum(
        3 * (4 * 2 * (i + o) + 4 * i) for i, o in shapes.values()
    )


def test_a_second_call_trains_nothing(trained: Trained) -> None:
    stacks = {path: path.stat().st_mtime_ns for path in trained.output.rglob("*.safetensors")}
    found, counter = run(trained.folder, HEAD + MOE + SINGLE, trained.output)
    assert counter == Counter(rounds=0, kept=["greet", "animals"] * 3)
    assert found == trained.found
    assert {path: path.stat().st_mtime_ns for path in trained.output.rglob("*.safetensors")} == stacks


def test_a_removed_run_is_redone_with_the_same_bits(trained: Trained) -> None:
    store = trained.output / "moe_lora" / "2"
    before = digests(store)
    kept = shutil.move(store, trained.folder / "kept")
    found, counter = run(trained.folder, HEAD + MOE + SINGLE, trained.output)
    assert counter.rounds == 4
    assert digests(store) == before
    assert found.variants["single_lora"] == trained.found.variants["single_lora"]
    shutil.rmtree(store)
    shutil.move(kept, store)  # with the same seconds as before


def test_a_killed_comparison_goes_on_to_the_same_bits(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(trained.folder, HEAD + SINGLE, tmp_path, Counter(killed_at=4))
    _, counter = run(trained.folder, HEAD + SINGLE, tmp_path)
    assert (counter.rounds, counter.kept) == (1, ["greet"])
    assert digests(tmp_path / "single_lora" / "1") == digests(trained.output / "single_lora" / "1")


def test_a_variant_does_not_feel_the_ones_before_it(trained: Trained, tmp_path: Path) -> None:
    run(trained.folder, HEAD + SINGLE, tmp_path)
    alone = digests(tmp_path / "single_lora" / "1")
    assert alone == digests(trained.output / "single_lora" / "1")
    assert len(alone) == 4
    assert set(alone).isdisjoint(digests(trained.output / "moe_lora" / "1"))


def test_other_bases_and_diverging_runs_stand_beside_the_others(
    trained: Trained, tmp_path: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    head = 'domains = ["greet"]\n' + HEAD + "overrides.training.rounds = 1\n"
    one = "[variants.first]\nseeds = [1, 2]\n[variants.greedy]\ntraining.min_gain = 99.0\n"
    two = f'[variants.qwen]\nbase.spec = "{tiny_base_folder("qwen2")}"\n[variants.last]\nstack.rank = 1\n'
    found, counter = run(trained.folder, head + one + two, tmp_path)
    assert counter.rounds == 5
    assert list(found.variants) == ["first", "greedy", "qwen", "last"]
    assert [len(list(variant.summary)) for variant in found.variants.values()] == [1, 0, 1, 1]
    (failure,) = found.failures()
    assert failure.startswith("greedy, seed 1: domain 'greet': its first round brought the held-out loss from ")
    assert found.curves("greet").keys() == {"first", "qwen", "last"}
    bases = {name: StackRegistry.open(tmp_path / name / "1").manifest.base_fingerprint for name in found.variants}
    assert bases["qwen"] not in (bases["first"], bases["last"])
    assert bases["first"] == bases["last"]


def test_the_command_writes_numbers_tables_and_curves(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = trained.output
    assert run_comparison(write(trained.folder, HEAD + MOE + SINGLE), output, None) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("comparison.json", "comparison.md", "validation_greet.png", "validation_animals.png"):
        assert f"written: {output / name}" in lines
        assert (output / name).is_file()
    assert read_report(output / "comparison.json", Comparison) == trained.found
    rows = (output / "comparison.md").read_text().splitlines()
    assert rows[0] == "# MoE-LoRA | a single one"
    loss = trained.found.variants["moe_lora"].summary["animals"]["loss"]
    alone = trained.found.variants["single_lora"].summary["animals"]["loss"]
    cells = f"{loss.median:.4f} ({loss.lowest:.4f} to {loss.highest:.4f}) | {alone.median:.4f}"
    assert f"| loss in context, after | {cells} |" in rows
    assert "|  | moe_lora (2 seeds) | single_lora (1 seed) |" in rows
    assert any("moe_lora (2 seeds)" in line for line in lines)


def test_without_matplotlib_the_rest_is_written_and_the_extra_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("canvas", "series", "comparison"):
        monkeypatch.delitem(sys.modules, f"training.figures.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import finds when a package is not there
    output = shutil.copytree(trained.output, tmp_path / "runs", ignore=shutil.ignore_patterns("*.png", "comparison.*"))
    assert run_comparison(write(trained.folder, HEAD + MOE + SINGLE), output, None) == 0
    assert "missing: figures need matplotlib: pip install -c constraints.txt -e '.[train]'" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == ["comparison.json", "comparison.md"]


def test_mistakes_and_diverged_runs_end_with_status_one(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    assert run_comparison(write(trained.folder, HEAD + SINGLE + "training.stepz = 3\n"), output, None) == 1
    assert "variant 'single_lora': training.stepz" in capsys.readouterr().err
    assert run_comparison(write(trained.folder, HEAD + SINGLE), output, "/no/such/base") == 1
    assert "/no/such/base" in capsys.readouterr().err
    assert not output.exists()
    assert run_comparison(write(trained.folder, HEAD + SINGLE + "training.min_gain = 99.0\n"), output, None) == 1
    assert "- single_lora, seed 1: domain 'greet'" in (output / "comparison.md").read_text()
    assert not list(output.glob("*.png"))
