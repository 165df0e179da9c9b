"""The command `brainstacks-train`. Knows arguments only: what a command does is imported when it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from training.router.target_kind import TargetKind

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Trains stacks and the router that mixes them.")

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", exists=True, dir_okay=False)]
BaseOption = Annotated[str | None, typer.Option(help="Another base than the recipe's: a folder or a hub id.")]
TargetsOption = Annotated[
    TargetKind | None,
    typer.Option(help="What the router learns; default: discovered, if the store has outcomes."),
]
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
def discover(
    recipe: RecipeArgument,
    store: Annotated[Path, typer.Option(help="The store whose domains are combined.", file_okay=False)],
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Try every combination.")] = False,
    prompts_per_domain: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's number.")] = None,
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Finds which combination of domains answers each training prompt best; goes on behind what is measured."""
    _settle_threads(threads)
    from training.discovery.command import run_discovery

    status = run_discovery(recipe, store, exhaustive=exhaustive, prompts_per_domain=prompts_per_domain, base_spec=base)
    raise typer.Exit(status)


@app.command()
def router(
    recipe: RecipeArgument,
    store: Annotated[Path, typer.Option(help="The store whose domains the router is to know.", file_okay=False)],
    targets: TargetsOption = None,
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Trains a router of the recipe's domains and makes it the store's router."""
    _settle_threads(threads)
    from training.router.command import run_router

    raise typer.Exit(run_router(recipe, store, targets=targets, base_spec=base))


@app.command()
def router_extend(
    recipe: RecipeArgument,
    store: Annotated[Path, typer.Option(help="The store whose router is to learn one more domain.", file_okay=False)],
    domain: Annotated[str, typer.Option(help="The domain; the store has its stacks, the recipe its records.")],
    targets: TargetsOption = None,
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Adds one domain to the store's router; the scores of the others keep their bits."""
    _settle_threads(threads)
    from training.router.command import run_router_extension

    raise typer.Exit(run_router_extension(recipe, store, domain, targets=targets, base_spec=base))


@app.command()
def evaluate(
    recipe: RecipeArgument,
    store: Annotated[Path, typer.Option(help="The store that is measured.", exists=True, file_okay=False)],
    modes: Annotated[str | None, typer.Option(help="Of base,label,ungated,routed,oracle; default: all.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks' JSONL files.", exists=True, file_okay=False)
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks, with commas between; default: all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Records of each domain and benchmark, at most.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: the store's reports.", file_okay=False)] = None,
    held_out: Annotated[bool, typer.Option(help="Measure the loss of held-out records.")] = True,
    run_code: Annotated[bool, typer.Option("--run-code", help="Let benchmarks run what the model wrote.")] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask benchmarks in the base's chat template.")
    ] = False,
    base: BaseOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measures held-out loss and benchmarks, mode by mode; goes on behind what is measured."""
    _settle_threads(threads)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws bars across ours
    from training.evaluating.command import run_evaluation

    status = run_evaluation(
        recipe,
        store,
        modes=modes,
        tasks=tasks,
        data=data,
        limit=limit,
        output=output,
        held_out=held_out,
        run_code=run_code,
        chat_template=chat_template,
        base_spec=base,
    )
    raise typer.Exit(status)


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
