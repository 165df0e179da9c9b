"""Runs a training command and shows it: progress bars, tables, errors. Knows the console, not the mathematics."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from engine.errors import EngineError
from router.errors import RouterError
from stack_store.errors import StoreError
from stack_store.registry import StackRegistry
from training import run as runs
from training.domain_training import DomainReport
from training.errors import RecipeInvalid, TrainingError
from training.recipe import Recipe, read_recipe
from training.router_training import RouterMetrics, RouterProgress
from training.stack_training import Progress as StackProgress

EXPECTED_ERRORS = (TrainingError, StoreError, EngineError, RouterError)


def run_recipe(recipe_path: Path, output: Path, *, only: Sequence[str]) -> int:
    """Trains a recipe's domains; returns the process's exit status."""
    console = Console()
    try:
        recipe = read_recipe(recipe_path)
        _require_known(recipe, only)
        base = runs.load_training_base(recipe)
        registry = runs.open_or_create_store(output, base)
        kept = runs.trained_domains(registry, recipe)
        reports: list[DomainReport] = []
        with _bars(console) as bars:
            for domain in recipe.settings.domains:
                if domain.name in kept or (only and domain.name not in only):
                    console.print(f"{domain.name}: kept as it is")
                    continue
                show = _stack_bar(bars, domain.name, recipe.settings.training.steps)
                reports.append(runs.run_domain(base, recipe, domain, registry, show))
    except EXPECTED_ERRORS as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    console.print(_loss_table(reports))
    return 0


def run_router(recipe_path: Path, store: Path) -> int:
    """Trains a recipe's router; returns the process's exit status."""
    console = Console()
    try:
        recipe = read_recipe(recipe_path)
        base = runs.load_training_base(recipe)
        registry = StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)
        runs.require_trained(registry, recipe)
        settings = runs.feature_settings(base)
        with _bars(console) as bars:
            examples = runs.router_examples(base, recipe, settings, _prompt_bar(bars))
            trained = runs.train_label_router(recipe, examples, _router_bar(bars))
        runs.register_router(base, recipe, settings, trained, registry)
        runs.write_report(registry.path, "router", asdict(trained.metrics) | {"best_epoch": trained.best_epoch})
    except EXPECTED_ERRORS as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    console.print(_router_table(trained.metrics))
    return 0


def _require_known(recipe: Recipe, only: Sequence[str]) -> None:
    names = [domain.name for domain in recipe.settings.domains]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise RecipeInvalid(f"the recipe has no domain {unknown[0]!r}; it has {names}")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
    )


def _stack_bar(bars: Progress, name: str, steps: int) -> Callable[[StackProgress], None]:
    bar = bars.add_task(name, total=steps, state="")

    def show(progress: StackProgress) -> None:
        state = f"loss {progress.loss:.3f}  best {progress.best_loss:.3f}  {progress.tokens_per_second:.0f} tokens/s"
        bars.update(bar, completed=progress.step, state=state)
        if progress.validation_loss is not None:
            bars.console.print(f"{name}: step {progress.step}, held-out loss {progress.validation_loss:.4f}")

    return show


def _prompt_bar(bars: Progress) -> Callable[[int, int], None]:
    bar = bars.add_task("features", total=None, state="")
    return lambda done, total: bars.update(bar, completed=done, total=total)


def _router_bar(bars: Progress) -> Callable[[RouterProgress], None]:
    bars_by_run: list[TaskID] = []

    def show(progress: RouterProgress) -> None:
        if not bars_by_run:
            bars_by_run.append(bars.add_task("router", total=progress.num_steps, state=""))
        bars.update(bars_by_run[0], completed=progress.step, state=f"loss {progress.loss:.4f}")

    return show


def _loss_table(reports: Sequence[DomainReport]) -> Table:
    table = Table("domain", "base", "with its stack", "steps", "seconds", title="loss per held-out answer token")
    for report in reports:
        losses = (f"{report.base_loss:.3f}", f"{report.stack_loss:.3f}")
        table.add_row(report.domain, *losses, str(report.steps_run), f"{report.seconds:.0f}")
    return table


def _router_table(metrics: RouterMetrics) -> Table:
    title = f"unseen prompts: top-1 {metrics.top1:.3f}, set match {metrics.set_match:.3f}, BCE {metrics.bce:.4f}"
    table = Table("domain", "precision", "recall", "prompts", title=title)
    for name, of_domain in metrics.domains.items():
        table.add_row(name, f"{of_domain.precision:.3f}", f"{of_domain.recall:.3f}", str(of_domain.num_positive))
    return table
