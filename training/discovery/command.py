"""Runs the command that discovers outcomes, and shows it. Knows the console, not the search."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.discovery.discovery import Progress as DiscoveryProgress
from training.discovery.report import DiscoveryReport, Estimate, LossSummary
from training.discovery.run import discover
from training.errors import RecipeInvalid
from training.expected_errors import EXPECTED_ERRORS, show_error
from training.progress_bars import make_bars
from training.recipe import Recipe, read_recipe, with_base
from training.run import load_training_base
from training.workers import Workers

SHOWN_COMBINATIONS = 3


def run_discovery(
    recipe_path: Path, store: Path, *, exhaustive: bool, prompts_per_domain: int | None, base_spec: str | None
) -> int:
    """Discovers the outcomes of a recipe's prompts; returns the process's exit status."""
    console = Console()
    try:
        recipe = with_base(read_recipe(recipe_path), base_spec)
        recipe = _with_options(recipe, exhaustive=exhaustive, prompts_per_domain=prompts_per_domain)
        workers = Workers()
        if workers.count > 1:
            raise RecipeInvalid(f"discovery runs in one process, not in {workers.count}")
        with make_bars(console) as bars:
            report = discover(recipe, load_training_base(recipe, workers), store, on_progress=_bar(bars))
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    console.print(_table(report))
    console.print(f"losses measured {report.rows_measured}, known {report.rows_from_cache}, {report.seconds:.0f} s")
    return 0


def _with_options(recipe: Recipe, *, exhaustive: bool, prompts_per_domain: int | None) -> Recipe:
    changes: dict[str, object] = {"search": "exhaustive"} if exhaustive else {}
    if prompts_per_domain is not None:
        changes["prompts_per_domain"] = prompts_per_domain
    section = recipe.settings.discovery.model_copy(update=changes)
    return replace(recipe, settings=recipe.settings.model_copy(update={"discovery": section}))


def _bar(bars: Progress) -> Callable[[DiscoveryProgress], None]:
    bar = bars.add_task("prompts", total=None, state="")

    def show(progress: DiscoveryProgress) -> None:
        state = f"losses measured {progress.rows_measured}, known {progress.rows_from_cache}"
        bars.update(bar, total=progress.total, completed=progress.done, state=state)

    return show


def _table(report: DiscoveryReport) -> Table:
    title = "loss per answer token, mean over prompts; in brackets, what the best combination saves"
    table = Table("prompts of", "number", "base", "label", "ungated", "best", "most frequent", title=title)
    for label, found in report.labels.items():
        wins = [f"{name} {count}" for name, count in list(found.wins.items())[:SHOWN_COMBINATIONS]]
        table.add_row(label, str(found.prompts), *_losses(found.losses), ", ".join(wins))
    prompts = sum(found.prompts for found in report.labels.values())
    table.add_row("all", str(prompts), *_losses(report.losses), "")
    return table


def _losses(losses: LossSummary) -> list[str]:
    compared = [f"{losses.prompt_mean[mode]:.3f} ({_interval(saved)})" for mode, saved in losses.saving.items()]
    return [*compared, f"{losses.prompt_mean['best']:.3f}"]


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f}, {estimate.low:.3f} to {estimate.high:.3f}"
