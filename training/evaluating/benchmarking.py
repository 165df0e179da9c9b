"""Chooses the benchmarks of a plan and runs them in its modes. Knows plans and reports, not the harness itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished
from training.evaluating.harness import Benchmark, Harness, run_benchmark
from training.evaluating.plan import Plan
from training.evaluating.report import TaskName, TaskReport, summarise_task
from training.evaluating.subject import Subject


class Benchmarks:
    """The plan's tasks with their documents, read and checked."""

    def __init__(self, plan: Plan, data: Path, *, seed: int) -> None:
        """Raises EvaluationInvalid that names the task, the file or the record at fault."""
        harness = Harness()
        self._plan, self._seed = plan, seed
        chosen, self.notes = _choose(plan, harness)
        self._benchmarks: Sequence[Benchmark] = harness.load(chosen, data, limit=plan.limit, seed=seed)

    def measure(
        self,
        subject: Subject,
        finished: Finished,
        *,
        max_tokens: int,
        on_progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> dict[TaskName, TaskReport]:
        """Every task in every mode that benchmarks know."""
        reports: dict[TaskName, TaskReport] = {}
        for benchmark in self._benchmarks:
            by_mode = {
                mode: run_benchmark(
                    benchmark,
                    mode,
                    subject,
                    finished=finished,
                    max_tokens=max_tokens,
                    chat_template=self._plan.chat_template,
                    on_progress=_in_mode(mode, on_progress),
                )
                for mode in self._plan.benchmark_modes
            }
            reports[benchmark.name] = summarise_task(
                by_mode,
                domain=benchmark.domain,
                chat_template=self._plan.chat_template and benchmark.may_chat,
                seed=self._seed,
            )
        return reports


def _choose(plan: Plan, harness: Harness) -> tuple[list[str], tuple[str, ...]]:
    """The tasks to run, and what to say of those that are left out."""
    names = list(plan.tasks) or harness.names
    running_code = [name for name in names if harness.runs_code(name)]
    if plan.run_code or not running_code:
        return names, ()
    if plan.tasks:
        raise EvaluationInvalid(f"{running_code} run code that the model wrote; allow it with --run-code")
    left_out = f"{running_code} were left out: they run code that the model wrote, which --run-code allows"
    return [name for name in names if name not in running_code], (left_out,)


def _in_mode(mode: str, on_progress: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    return lambda name, done, total: on_progress(f"{name} {mode}", done, total)
