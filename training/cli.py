"""The command `brainstacks-train`. Knows arguments only: what a command does is imported when it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Trains stacks and the router that mixes them.")

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", exists=True, dir_okay=False)]
BaseOption = Annotated[str | None, typer.Option(help="Another base than the recipe's: a folder or a hub id.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one a core.")]


def main() -> None:
    """Runs the command line."""
    app()


@app.command()
def run(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="The store to train into; made if it is not there.", file_okay=False)],
    until: Annotated[str | None, typer.Option(help="Stop after this domain; the next run goes on behind it.")] = None,
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Trains the recipe's domains in order; goes on behind what an earlier run of the same recipe finished."""
    _settle_threads(threads)
    from training.commands import run_recipe

    raise typer.Exit(run_recipe(recipe, output, until=until, base_spec=base))


@app.command()
def router(
    recipe: RecipeArgument,
    store: Annotated[Path, typer.Option(help="The store whose domains the router is to know.", file_okay=False)],
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Trains a router on the recipe's domain labels and makes it the store's router."""
    _settle_threads(threads)
    from training.commands import run_router

    raise typer.Exit(run_router(recipe, store, base_spec=base))


@app.command()
def figures(
    store: Annotated[Path, typer.Argument(help="The store whose reports are drawn.", exists=True, file_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Folder of the pictures; default: figures in the store.")] = None,
) -> None:
    """Draws what a run wrote down: PNG files, and their numbers as JSON."""
    from training.figures.command import run_figures

    raise typer.Exit(run_figures(store, output))


@app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment, a TOML file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="Folder of the runs' stores and of the result.", file_okay=False)],
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Trains variants of a recipe from several seeds and compares them; goes on behind what is finished."""
    _settle_threads(threads)
    from training.comparison_command import run_comparison

    raise typer.Exit(run_comparison(experiment, output, base))


def _settle_threads(threads: int | None) -> None:
    """Sets OpenMP up before torch is imported: large products, so waiting threads spin only briefly."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


if __name__ == "__main__":  # accelerate launch -m training.cli
    main()
