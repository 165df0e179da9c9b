"""Runs the command that compares variants of a recipe, and shows it. Knows the console and files, no mathematics."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from stack_store.atomic import replace_file
from training.comparing import compare
from training.comparison import Comparison
from training.comparison_table import as_markdown
from training.errors import TrainingError
from training.expected_errors import EXPECTED_ERRORS, show_error
from training.experiment import PlannedRun, read_experiment
from training.reports import DomainReport, RoundReport, write_report
from training.round_training import Progress as StackProgress
from training.workers import Workers


def run_comparison(experiment: Path, output: Path, base_spec: str | None) -> int:
    """Trains and compares an experiment's variants; returns the process's exit status, 1 if a run diverged too."""
    workers = Workers()
    console = Console(quiet=not workers.is_first)
    try:
        plan = read_experiment(experiment, base_spec=base_spec)
        with _bars(console) as bars:
            watched = _Watched(bars, num_runs=len(plan.runs))
            comparison = compare(plan, output, workers=workers, watch=watched.next_run)
            watched.finish()
        if workers.is_first:
            _write(comparison, output, console)
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    return 1 if comparison.failures() else 0


def _write(comparison: Comparison, output: Path, console: Console) -> None:
    text = as_markdown(comparison)
    console.print(Markdown(text))
    write_report(output / "comparison.json", comparison)
    with replace_file(output / "comparison.md") as file:
        file.write(text.encode())
    written = [output / "comparison.json", output / "comparison.md", *_draw(comparison, output, console)]
    for path in written:
        console.print(f"written: {escape(str(path))}", soft_wrap=True)


def _draw(comparison: Comparison, output: Path, console: Console) -> list[Path]:
    """A PNG of the validation curves for each domain that any run finished."""
    try:
        # Here, because it is matplotlib's absence that it reports.
        from training.figures.comparison import draw_comparison
    except TrainingError as error:
        console.print(f"[yellow]missing:[/yellow] {escape(str(error))}", soft_wrap=True)
        return []
    by_domain = {domain: comparison.curves(domain) for domain in comparison.domains}
    return [
        draw_comparison(curves, output / f"validation_{domain}.png", title=f"{comparison.title}: {domain}")
        for domain, curves in by_domain.items()
        if curves
    ]


class _Watched:
    """Shows an experiment as a bar of its runs and one of the running round."""

    def __init__(self, bars: Progress, *, num_runs: int) -> None:
        self._bars, self._num_started = bars, 0
        self._runs = bars.add_task("runs", total=num_runs, state="")
        self._round = bars.add_task("", total=None, visible=False, state="")

    def next_run(self, run: PlannedRun) -> "_WatchedRun":
        """The run that starts now; the one before is over."""
        name = f"{run.variant}, seed {run.seed}"
        self._bars.update(self._runs, completed=self._num_started, state=name)
        self._num_started += 1
        return _WatchedRun(self._bars, name, self._round)

    def finish(self) -> None:
        self._bars.update(self._runs, completed=self._num_started, state="")
        self._bars.update(self._round, visible=False)


class _WatchedRun:
    """The spectator of one run."""

    def __init__(self, bars: Progress, name: str, bar: TaskID) -> None:
        self._bars, self._name, self._bar = bars, name, bar

    def round_starts(self, domain: str, round: int, steps: int) -> Callable[[StackProgress], None]:
        self._bars.reset(self._bar, total=steps, description=f"{domain} {round}", visible=True)

        def show(progress: StackProgress) -> None:
            state = f"loss {progress.loss:.3f}  best {progress.best_loss:.3f}"
            self._bars.update(self._bar, completed=progress.step, state=state)

        return show

    def round_ends(self, domain: str, report: RoundReport) -> None:
        fate = "kept" if report.kept else "dropped"
        losses = f"{report.start_loss:.4f} -> {report.best_loss:.4f}"
        self._say(f"{domain} {report.round}: {losses}, {fate}, ended by {report.stop}")

    def domain_ends(self, report: DomainReport, *, trained_now: bool) -> None:
        if not trained_now:
            self._say(f"{report.domain}: kept as it is")

    def _say(self, line: str) -> None:
        self._bars.console.print(f"{self._name}: {line}", soft_wrap=True)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
    )
