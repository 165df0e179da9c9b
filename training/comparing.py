"""Trains every run of an experiment into a store of its own and gathers what they found. Knows no console.

A run goes on behind what an earlier call finished of it. One base serves all runs that name the same one: each round
points the base's wrappers at its own deltas, and nothing else of a run stays in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.model.base import Base
from training.comparison import Comparison, RunNumbers, compare_runs
from training.curriculum import Curriculum, Spectator
from training.errors import TrainingDiverged
from training.experiment import Experiment, PlannedRun
from training.recipe import BaseSection
from training.router.store_router import routing_policy
from training.run import load_training_base, make_store
from training.run_numbers import read_run
from training.workers import Workers

Watch = Callable[[PlannedRun], Spectator]


def store_of(output: Path, run: PlannedRun) -> Path:
    """Where a run's store lies."""
    return output / run.variant / str(run.seed)


def compare(experiment: Experiment, output: Path, *, workers: Workers, watch: Watch) -> Comparison:
    """Trains what is not finished; `watch` is called once for each run, with nothing trained of it yet.

    A run that diverges is a finding: it is named in the result, and the others go on. Any other fault is raised.
    """
    failures: dict[tuple[str, int], str] = {}
    for runs in _by_base(experiment.runs):
        failures |= _train(runs, output, workers, watch)
    workers.wait()
    found: dict[str, list[RunNumbers]] = {}
    for run in experiment.runs:
        numbers = read_run(store_of(output, run), run.recipe)
        found.setdefault(run.variant, []).append(RunNumbers(run.seed, numbers, failures.get((run.variant, run.seed))))
    return compare_runs(experiment.title, experiment.domains, found)


def _by_base(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    groups: dict[BaseSection, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(run.recipe.settings.base, []).append(run)
    return list(groups.values())


def _train(runs: Sequence[PlannedRun], output: Path, workers: Workers, watch: Watch) -> dict[tuple[str, int], str]:
    """Trains runs of one base, which is released at the end; returns why those failed that did."""
    base = load_training_base(runs[0].recipe, workers)
    failures = {}
    for run in runs:
        try:
            _curriculum(run, base, store_of(output, run), workers, watch(run)).run()
        except TrainingDiverged as error:
            failures[run.variant, run.seed] = str(error)
    return failures


def _curriculum(run: PlannedRun, base: Base, store: Path, workers: Workers, spectator: Spectator) -> Curriculum:
    make_store(store, base, workers)
    policy = routing_policy(run.recipe)
    return Curriculum(run.recipe, base, store, policy=policy, workers=workers, spectator=spectator)
