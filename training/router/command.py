"""Runs the commands that train and extend a router, and shows them. Knows the console, not the mathematics."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from engine.model.base import Base
from training.errors import RecipeInvalid
from training.expected_errors import EXPECTED_ERRORS, show_error
from training.progress_bars import make_bars
from training.recipe import Recipe, read_recipe, with_base
from training.router.extension_run import extend_store_router
from training.router.learning import RouterProgress
from training.router.reports import DomainQuality, ExtensionReport, GapReport, RouterReport
from training.router.run import train_store_router
from training.router.target_kind import TargetKind
from training.router.watch import Watch
from training.run import load_training_base
from training.workers import Workers

Report = TypeVar("Report")


def run_router(recipe_path: Path, store: Path, *, targets: TargetKind | None, base_spec: str | None) -> int:
    """Trains a recipe's router; returns the process's exit status."""
    return _run(
        recipe_path,
        base_spec,
        lambda recipe, base, watch: train_store_router(recipe, base, store, wanted=targets, watch=watch),
        show_router,
    )


def run_router_extension(
    recipe_path: Path, store: Path, domain: str, *, targets: TargetKind | None, base_spec: str | None
) -> int:
    """Adds a domain to a store's router; returns the process's exit status."""
    return _run(
        recipe_path,
        base_spec,
        lambda recipe, base, watch: extend_store_router(recipe, base, store, domain, wanted=targets, watch=watch),
        show_extension,
    )


def _run(
    recipe_path: Path,
    base_spec: str | None,
    work: Callable[[Recipe, Base, Watch], Report],
    show: Callable[[Console, Report], None],
) -> int:
    console = Console()
    try:
        recipe = with_base(read_recipe(recipe_path), base_spec)
        workers = Workers()
        if workers.count > 1:
            raise RecipeInvalid(f"a router is trained in one process, not in {workers.count}")
        with make_bars(console) as bars:
            report = work(recipe, load_training_base(recipe, workers), _watch(bars))
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    show(console, report)
    return 0


def show_router(console: Console, report: RouterReport) -> None:
    """What the store's router learnt and how well, beside the router of the labels."""
    unsearched = sum(report.unsearched_prompts.values())
    console.print(
        f"targets: {report.targets}; {report.num_train} prompts to train on, {report.num_validation} to validate"
        + (f"; {unsearched} without an outcome" if unsearched else "")
    )
    table = Table("router", "names the label", "top-1", "set match", "BCE", "calibration error", "best epoch")
    for kind, evaluation in report.routers.items():
        metrics = evaluation.metrics
        shares = (evaluation.label_top1, metrics.top1, metrics.set_match)
        numbers = (f"{metrics.bce:.4f}", f"{evaluation.calibration.expected_error:.4f}", str(evaluation.best_epoch))
        table.add_row(kind, *map(_share, shares), *numbers)
    console.print(table)
    console.print(_domain_table(report))
    console.print(gap_line(report.gap))


def gap_line(gap: GapReport) -> str:
    """The gap signal in one line."""
    if gap.calibration is None or gap.check is None:
        return f"gap signal: below {gap.threshold:.3f}, not calibrated: the recipe names no router.out_of_domain"
    return (
        f"gap signal: below {gap.threshold:.3f}; of prompts that chose nothing it flags {gap.check.false_alarms:.3f} "
        f"inside and {gap.check.caught:.3f} outside (area under ROC {gap.check.curve.area:.3f})"
    )


def show_extension(console: Console, report: ExtensionReport) -> None:
    """The new domain's quality, beside that of a router trained anew."""
    title = f"{report.domain}, learnt from {report.targets}, on {report.num_validation} validation prompts"
    table = Table("router", "precision", "recall", "AUC", "BCE", "set match of all domains", title=title)
    sides = (("extended", report.extended, report.extended_metrics),)
    for name, quality, metrics in (*sides, ("trained anew", report.retrained, report.retrained_metrics)):
        table.add_row(name, *_quality(quality), _share(metrics.set_match))
    console.print(table)


def _domain_table(report: RouterReport) -> Table:
    table = Table("domain", "prompts", *(f"{kind}: precision, recall" for kind in report.routers))
    for name in report.prompts:
        cells = []
        for evaluation in report.routers.values():
            of_domain = evaluation.metrics.domains[name]
            cells.append(f"{_share(of_domain.precision)}, {_share(of_domain.recall)}")
        table.add_row(name, str(report.prompts[name]), *cells)
    return table


def _quality(quality: DomainQuality) -> tuple[str, str, str, str]:
    metrics = quality.metrics
    return _share(metrics.precision), _share(metrics.recall), _share(quality.auc), f"{quality.bce:.4f}"


def _watch(bars: Progress) -> Watch:
    tasks: dict[str, TaskID] = {}

    def task(name: str) -> TaskID:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=None, state="")
        return tasks[name]

    def show_step(name: str, progress: RouterProgress) -> None:
        state = f"loss {progress.loss:.4f}"
        bars.update(task(name), completed=progress.step, total=progress.num_steps, state=state)

    return Watch(
        on_prompt=lambda done, total: bars.update(task("features"), completed=done, total=total), on_step=show_step
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
