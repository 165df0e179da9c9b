"""The `brainstacks` command. Knows options and how answers look in a terminal.

Each command imports what it needs itself, so that `--help` answers at once. Longer than most files because it is the
list of all options.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="brainstacks",
    help="Serves one frozen language model whose expertise is paged in from disk, prompt by prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stacks_app = typer.Typer(help="Look at and change the stacks of a running server.", no_args_is_help=True)
app.add_typer(stacks_app, name="stacks")

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="The server; default: host and port of the settings.")]
ApiKeyOption = Annotated[str | None, typer.Option("--api-key", help="Default: the first of the settings.")]
AdminKeyOption = Annotated[str | None, typer.Option("--admin-key", help="Default: the one of the settings.")]
MixOption = Annotated[list[str] | None, typer.Option("--mix", help="Force a mix: DOMAIN=WEIGHT, may be repeated.")]


def main() -> None:
    """Entry point of the script."""
    app()


@contextmanager
def _told_plainly() -> Iterator[None]:
    """An error that was raised on purpose is one line and exit status 1, not a traceback."""
    from engine.errors import EngineError
    from router.errors import RouterError
    from server.errors import ServerError
    from stack_store.errors import StoreError

    try:
        yield
    except (ServerError, EngineError, RouterError, StoreError) as error:
        typer.secho(f"error: {_printable(str(error))}", fg="red", err=True)
        raise typer.Exit(1) from error


def _printable(text: str) -> str:
    """In one line. A message may quote a file of a stranger's, which must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


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
) -> None:
    """Start the server."""
    from server.config import load_settings
    from server.serve import run_server

    flags: dict[str, dict[str, object]] = {
        "server": {"host": host, "port": port},
        "engine": {"base": base, "max_batch_rows": max_batch_rows, "threads": threads},
        "store": {"path": store, "device_budget_bytes": device_budget_bytes},
        "log": {"level": log_level},
    }
    with _told_plainly():
        run_server(load_settings(config, {name: _given(values) for name, values in flags.items()}))


@app.command()
def chat(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    config: ConfigOption = None,
    mix: MixOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
) -> None:
    """Talk to a running server; shows the mix of every answer. An empty line or Ctrl-D ends."""
    from server.terminal_chat import run_chat

    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if mix:
        fields["brainstacks"] = {"mix": _parse_mix(mix)}
    with _told_plainly(), _client(url, config, api_key=api_key) as client:
        run_chat(client, fields)


@app.command()
def route(
    text: str,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the router's scores of a text and the mix made of them."""
    from rich.console import Console
    from rich.table import Table

    with _told_plainly(), _client(url, config, api_key=api_key) as client:
        answer = client.route(text)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    table = Table("domain", "score", "weight", title="no domain knows this text" if answer["gap"] else None)
    for domain, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
        weight = answer["mix"].get(domain)
        table.add_row(domain, f"{score:.3f}", "" if weight is None else f"{weight:.3f}")
    Console().print(table)


@stacks_app.command("list")
def list_stacks(url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None) -> None:
    """List the registered domains and where they are."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    with _told_plainly(), _client(url, config, admin_key=admin_key) as client:
        answer = client.domains()
    table = Table("domain", "version", "rounds", "on disk", "resident", "state", "leases", "pinned")
    for domain in answer["domains"]:
        sizes = decimal(domain["bytes"]), decimal(domain["resident_bytes"] or 0)
        pinned = "yes" if domain["pinned"] else ""
        rounds, leases = str(len(domain["stacks"])), str(domain["leases"])
        table.add_row(domain["name"], domain["version"], rounds, *sizes, domain["state"], leases, pinned)
    Console().print(table)


@stacks_app.command("show")
def show_stack(name: str, url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None) -> None:
    """Show one domain as JSON."""
    with _told_plainly(), _client(url, config, admin_key=admin_key) as client:
        typer.echo(json.dumps(client.domain(name), indent=2))


@stacks_app.command("verify")
def verify_stacks(
    paths: Annotated[list[Path], typer.Argument(help="Stack files, or folders that are searched for them.")],
) -> None:
    """Check stack files completely, without a server."""
    from stack_store.errors import StoreError
    from stack_store.format import verify_stack

    files = [file for path in paths for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])]
    if not files:
        typer.secho(f"error: no stack file under {', '.join(map(str, paths))}", fg="red", err=True)
        raise typer.Exit(1)
    num_bad = 0
    for file in files:
        try:
            header, digest = verify_stack(file)
        except (StoreError, OSError) as error:
            num_bad += 1
            typer.secho(f"bad   {file}: {error}", fg="red")
        else:
            typer.echo(f"good  {file}: domain={header.domain} round={header.round} digest={digest}")
    raise typer.Exit(1 if num_bad else 0)


@stacks_app.command("push")
def push_stacks(
    name: str,
    files: Annotated[list[Path], typer.Argument(help="The domain's stack files, round 1 first.", exists=True)],
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option(help="Upload and check, but register nothing.")] = False,
) -> None:
    """Upload stack files and register them as a domain."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    with _told_plainly(), _client(url, config, admin_key=admin_key) as client, progress:
        stacks = []
        for file in files:
            task = progress.add_task(file.name, total=file.stat().st_size)
            stacks.append({"sha256": client.upload(file, lambda sent, task=task: progress.advance(task, sent))})
        answer = client.register(name, stacks, dry_run=dry_run)
    typer.echo(json.dumps(answer, indent=2))


@stacks_app.command("register")
def register_stacks(
    name: str,
    objects: Annotated[
        list[str], typer.Argument(metavar="URL@SHA256...", help="The domain's stacks in object storage, round 1 first.")
    ],
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option(help="Fetch and check, but register nothing.")] = False,
) -> None:
    """Register stacks that the server fetches itself, from under its store.object_roots."""
    from rich.console import Console

    stacks = [_parse_object(text) for text in objects]
    waiting = Console(stderr=True).status(f"{name}: the server fetches what it does not have")
    with _told_plainly(), _client(url, config, admin_key=admin_key) as client, waiting:
        answer = client.register(name, stacks, dry_run=dry_run)
    typer.echo(json.dumps(answer, indent=2))


@stacks_app.command("import-reference")
def import_reference(
    folder: Annotated[Path, typer.Argument(help="The published folder: its manifest, stacks and router.")],
    store: Annotated[Path, typer.Option(help="Folder of the store; made if it is missing.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base; default: the store's, else the embedded one.")
    ] = None,
    manifest: Annotated[str, typer.Option(help="Path of the manifest in the folder.")] = "manifest.json",
    router: Annotated[str, typer.Option(help="Path of the router in the folder.")] = "meta_router.pt",
    without_router: Annotated[bool, typer.Option("--without-router", help="Import the stacks alone.")] = False,
    trained_on: Annotated[
        str | None, typer.Option(help="The model that the manifest names, where the base has another name.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts that each token uses; no stack file says it.")] = 2,
    scale: Annotated[
        float | None, typer.Option(help="Of every delta; no stack file says it. 4.0, if the rank is the paper's 16.")
    ] = None,
    mid_layer: Annotated[
        int | None, typer.Option(help="Hidden state that the router reads beside the last; default: the middle one.")
    ] = None,
    mid_weight: Annotated[float, typer.Option(help="Of that hidden state.")] = 0.45,
    last_weight: Annotated[float, typer.Option(help="Of the last hidden state.")] = 0.55,
    max_tokens: Annotated[int, typer.Option(help="Tokens that the router reads.")] = 256,
    replace: Annotated[bool, typer.Option("--replace", help="Replace domains and router of the store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing.")] = False,
) -> None:
    """Import a store that was published in the format of the paper's code."""
    from rich.console import Console
    from rich.progress import Progress

    from server.reference_import.importing import ImportPlan, run_import
    from server.reference_import.settings import RouterSettings, StackSettings

    stacks = StackSettings(top_k, scale)
    router_settings = None if without_router else RouterSettings(router, mid_layer, mid_weight, last_weight, max_tokens)
    plan = ImportPlan(folder, store, base, manifest, trained_on, stacks, router_settings, replace, dry_run)
    with _told_plainly(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("stacks", total=None)
        report = run_import(plan, lambda done, total: progress.update(task, completed=done, total=total))
    for line in report.lines():
        typer.echo(line)


@stacks_app.command("remove")
def remove_stacks(
    name: str, url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None
) -> None:
    """Delete a domain; requests that use it finish."""
    with _told_plainly(), _client(url, config, admin_key=admin_key) as client:
        typer.echo(json.dumps(client.remove(name), indent=2))


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
    seed: Annotated[int, typer.Option(help="Of the random times.")] = 0,
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
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from server.bench import BenchPlan, run_bench

    if clients is not None and rate is not None:
        _end_usage("--clients and --rate exclude each other")
    routes = [_parse_route(text) for text in route or ["router"]]
    with _told_plainly(), Progress(console=Console(stderr=True)) as progress:
        url, key = _address(url, config, api_key)
        plan = BenchPlan(url, key, requests, prompt, prompt_tokens, max_tokens, routes, clients or 1, rate, seed)
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


def _parse_mix(entries: list[str]) -> dict[str, float]:
    mix = {}
    for entry in entries:
        domain, _, weight = entry.partition("=")
        try:
            mix[domain] = float(weight)
        except ValueError:
            _end_usage(f"a mix is DOMAIN=WEIGHT, got {entry!r}")
    return mix


def _parse_object(text: str) -> dict[str, str]:
    url, _, sha256 = text.rpartition("@")
    if not url or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        _end_usage("an object is URL@SHA256 with 64 lower-case hex digits at the end")  # the URL may hold a secret
    return {"url": url, "sha256": sha256}


def _parse_route(text: str) -> Any:
    """A Route: not named as a type, because its module is imported only here."""
    from server.bench import Route

    if text == "router":
        return Route(text, None)
    return Route(text, {} if text == "base" else _parse_mix(text.split(",")))


def _end_usage(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(2) from None


def _address(url: str | None, config: Path | None, api_key: str | None) -> tuple[str, str | None]:
    from server.config import load_settings

    server = load_settings(config).server
    return url or f"http://{server.host}:{server.port}", api_key or next(iter(server.api_keys), None)


@contextmanager
def _client(
    url: str | None, config: Path | None, *, api_key: str | None = None, admin_key: str | None = None
) -> Iterator[Any]:
    """A ServerClient: not named as a type, because its module is imported only here."""
    from server.client import ServerClient
    from server.config import load_settings

    address, key = _address(url, config, api_key)
    with ServerClient(address, api_key=key, admin_key=admin_key or load_settings(config).server.admin_key) as client:
        yield client


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
