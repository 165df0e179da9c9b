"""Runs the command that draws a store's figures, and shows it. Knows the console, not the figures."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from training.expected_errors import EXPECTED_ERRORS, show_error

FIGURES_FOLDER = "figures"


def run_figures(store: Path, output: Path | None) -> int:
    """Draws a store's figures into `output`, by default its folder `figures`; returns the process's exit status."""
    console = Console()
    try:
        # Here, because it is matplotlib's absence that it reports.
        from training.figures.store_figures import draw_figures

        with console.status("drawing"):
            result = draw_figures(store, output or store / FIGURES_FOLDER)
    except EXPECTED_ERRORS as error:
        show_error(error)
        return 1
    for path in result.written:
        console.print(f"written: {escape(str(path))}", soft_wrap=True)
    for part in result.missing:
        console.print(f"[yellow]missing:[/yellow] {escape(part)}", soft_wrap=True)
    return 0
