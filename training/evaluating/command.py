"""Runs the command that evaluates a store, and shows it. Knows the console, no mathematics."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from training.evaluating.modes import read_modes
from training.evaluating.plan import Plan
from training.evaluating.report import REPORT_NAME
from training.evaluating.run import evaluate_store
from training.evaluating.table import as_markdown
from training.expected_errors import EXPECTED_ERRORS, show_error
from training.recipe import read_recipe, with_base
from training.reports import REPORTS_FOLDER
from training.run import load_training_base
from training.workers import Workers


def run_evaluation(
    recipe_path: Path,
    store: Path,
    *,
    modes: str | None,
    tasks: str | None,
    data: Path | None,
    limit: int | None,
    output: Path | None,
    held_out: bool,
    run_code: bool,
    chat_template: bool,
    base_spec: str | None,
) -> int:
    """Evaluates a store; `modes` and `tasks` are names with commas between. Returns the process's exit status."""
    console = Console()
    folder = output or store / REPORTS_FOLDER
    try:
        plan = Plan(
            modes=read_modes(_names(modes)),
            held_out=held_out,
            data=data,
            tasks=tuple(_names(tasks)),
            limit=limit,
            run_code=run_code,
            chat_template=chat_template,
        )
        recipe = with_base(read_recipe(recipe_path), base_spec)
        base = load_training_base(recipe, Workers())
        with _bars(console) as bars:
            report = evaluate_store(recipe, base, store, folder, plan, _show(bars))
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    console.print(Markdown(as_markdown(report)))
    console.print(f"written: {escape(str(folder / REPORT_NAME))}.json and .md", soft_wrap=True)
    return 0


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _show(bars: Progress) -> Callable[[str, int, int], None]:
    """A bar for everything that is done."""
    by_name: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in by_name:
            by_name[name] = bars.add_task(name, total=total)
        bars.update(by_name[name], completed=done, total=total)

    return show
