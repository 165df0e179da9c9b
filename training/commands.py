"""Runs a training command and shows it: progress bars, tables, errors. Knows the console, not the mathematics."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.curriculum import Curriculum
from training.errors import RecipeInvalid
from training.expected_errors import EXPECTED_ERRORS, show_error
from training.progress_bars import make_bars
from training.recipe import Recipe, read_recipe, with_base
from training.reports import DomainReport, RoundReport
from training.round_training import Progress as StackProgress
from training.router.store_router import routing_policy
from training.run import load_training_base, make_store
from training.workers import Workers


def run_recipe(recipe_path: Path, output: Path, *, until: str | None, base_spec: str | None) -> int:
    """Trains a recipe's domains; returns the process's exit status."""
    workers = Workers()
    console = Console(quiet=not workers.is_first)
    try:
        recipe = with_base(read_recipe(recipe_path), base_spec)
        _require_known(recipe, until)
        if workers.count > 1 and recipe.settings.training.tokens_per_pass is None:
            raise RecipeInvalid(f"{workers.count} workers share the passes of a step: set training.tokens_per_pass")
        base = load_training_base(recipe, workers)
        make_store(output, base, workers)
        with make_bars(console) as bars:
            curriculum = Curriculum(
                recipe,
                base,
                output,
                policy=routing_policy(recipe),
                workers=workers,
                spectator=_ConsoleSpectator(bars),
            )
            reports = curriculum.run(until=until)
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    console.print(_loss_table(reports))
    return 0


class _ConsoleSpectator:
    """Shows a run as bars and lines."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def round_starts(self, domain: str, round: int, steps: int) -> Callable[[StackProgress], None]:
        name = f"{domain} {round}"
        bar = self._bars.add_task(name, total=steps, state="")

        def show(progress: StackProgress) -> None:
            state = (
                f"loss {progress.loss:.3f}  best {progress.best_loss:.3f}  {progress.tokens_per_second:.0f} tokens/s"
            )
            self._bars.update(bar, completed=progress.step, state=state)
            if progress.validation_loss is not None:
                line = f"{name}: step {progress.step}, held-out loss {progress.validation_loss:.4f}"
                self._bars.console.print(line)

        return show

    def round_ends(self, domain: str, report: RoundReport) -> None:
        fate = "kept" if report.kept else "dropped"
        losses = f"{report.start_loss:.4f} -> {report.best_loss:.4f}"
        self._bars.console.print(f"{domain} {report.round}: {losses}, {fate}, ended by {report.stop}")

    def domain_ends(self, report: DomainReport, *, trained_now: bool) -> None:
        if not trained_now:
            self._bars.console.print(f"{report.domain}: kept as it is")


def _require_known(recipe: Recipe, until: str | None) -> None:
    names = [domain.name for domain in recipe.settings.domains]
    if until is not None and until not in names:
        raise RecipeInvalid(f"the recipe has no domain {until!r}; it has {names}")


def _loss_table(reports: Sequence[DomainReport]) -> Table:
    table = Table("domain", "base", "with its stacks", "rounds", "seconds", title="loss per held-out answer token")
    for report in reports:
        rounds = f"{sum(r.kept for r in report.rounds)} of {len(report.rounds)}"
        losses = (f"{report.base_loss:.3f}", f"{report.loss:.3f}")
        table.add_row(report.domain, *losses, rounds, f"{report.seconds:.0f}")
    return table
