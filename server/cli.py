"""The `brainstacks` command. Knows options and how answers look in a terminal.

Each command imports what it needs itself, so that `--help` answers at once. Longer than most files because it is the
list of all options.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli_shared import (
    AdminKeyOption,
    ApiKeyOption,
    ConfigOption,
    JsonOption,
    UrlOption,
    address,
    end_usage,
    open_client,
    told_plainly,
)
from server.cli_stacks import stacks_app

app = typer.Typer(
    name="brainstacks",
    help="Serves one frozen language model whose expertise is paged in from disk, prompt by prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(stacks_app, name="stacks")

MixOption = Annotated[list[str] | None, typer.Option("--mix", help="Force a mix: DOMAIN=WEIGHT, may be repeated.")]


def main() -> None:
    """Entry point of the script."""
    app()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base; default: the embedded one.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the store; made if it is missing.")] = None,
    config: ConfigOption = None,
    device_budget_bytes: Annotated[int | None, typer.Option(help="Bytes of domains to keep resident.")] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Sequences that are computed together.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine's products.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json: one object a line.")] = None,
) -> None:
    """Start the server."""
    from server.config import load_settings
    from server.serve import run_server

    flags: dict[str, dict[str, object]] = {
        "server": {"host": host, "port": port},
        "engine": {"base": base, "max_batch_rows": max_batch_rows, "threads": threads},
        "store": {"path": store, "device_budget_bytes": device_budget_bytes},
        "log": {"level": log_level, "format": log_format},
    }
    with told_plainly():
        run_server(load_settings(config, {name: _given(values) for name, values in flags.items()}))


@app.command()
def chat(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
    mix: MixOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
) -> None:
    """Talk to a running server; shows the mix of every answer. /help lists commands; Ctrl-D ends."""
    from server.terminal_chat import run_chat

    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if mix:
        fields["brainstacks"] = {"mix": _mix(mix)}
    with told_plainly(), open_client(url, config, api_key=api_key, admin_key=admin_key) as client:
        run_chat(client, fields)


@app.command()
def route(
    text: str,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the router's scores of a text and the mix made of them."""
    from rich.console import Console

    from server.terminal_tables import route_table

    with told_plainly(), open_client(url, config, api_key=api_key) as client:
        answer = client.route(text)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        Console().print(route_table(answer))


@app.command()
def size(
    base: Annotated[
        list[str] | None,
        typer.Option(help="A base of the list, a folder or a hub id; may be repeated. Default: the list."),
    ] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a stack.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rank of each expert.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Stacks of a domain.")] = 2,
) -> None:
    """Compute what stacks, domains and tokens of a base take, without loading it. Prints Markdown."""
    from server.sizing import find_shape, known_shapes, sizing_tables

    with told_plainly():
        shapes = [find_shape(name) for name in base] if base else known_shapes()
        typer.echo(sizing_tables(shapes, experts=experts, rank=rank, rounds=rounds))


@app.command()
def bench(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    config: ConfigOption = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="Clients that ask again when they were answered; 1 unless there is a rate."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests a second at random times, however long the answers take."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the random times and the prompts; another for each run unless it is given."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 16,
    prompt: Annotated[str | None, typer.Option(help="What every request asks; else each prompt is another.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About how long each prompt is.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    route: Annotated[
        list[str] | None,
        typer.Option(help="router, base, or DOMAIN=WEIGHT[,DOMAIN=WEIGHT]; repeated, requests take them in turn."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Measure a running server: throughput, time to first token and per token, in all and by route."""
    from random import randrange

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from server.bench import BenchPlan, run_bench

    if clients is not None and rate is not None:
        end_usage("--clients and --rate exclude each other")
    routes = [_parse_route(text) for text in route or ["router"]]
    with told_plainly(), Progress(console=Console(stderr=True)) as progress:
        where = address(url, config, api_key=api_key)
        seed = randrange(1_000_000) if seed is None else seed  # noqa: S311 - no secret
        plan = BenchPlan(
            where.url, where.api_key, requests, prompt, prompt_tokens, max_tokens, routes, clients or 1, rate, seed
        )
        task = progress.add_task("asking", total=requests)
        figures = run_bench(plan, lambda: progress.advance(task))
    if not as_json:
        for name, values in {"all routes": figures, **figures["routes"]}.items():
            table = Table("figure", "value", title=name)
            for figure, value in values.items():
                if figure != "routes":
                    table.add_row(figure, json.dumps(value) if isinstance(value, dict) else str(value))
            Console().print(table)
    typer.echo(json.dumps(figures))


def _given(values: dict[str, object]) -> dict[str, object]:
    """The options that were given; the others leave the word to environment and file."""
    return {name: value for name, value in values.items() if value is not None}


def _mix(entries: list[str]) -> dict[str, float]:
    from server.terminal_mix import parse_mix

    try:
        return parse_mix(entries)
    except ValueError as error:
        end_usage(str(error))


def _parse_route(text: str) -> Any:
    """A Route: not named as a type, because its module is imported only here."""
    from server.bench import Route

    if text == "router":
        return Route(text, None)
    return Route(text, {} if text == "base" else _mix(text.split(",")))


if __name__ == "__main__":
    main()
