"""The commands `brainstacks stacks ...`. Knows options and how answers look in a terminal.

Longer than most files because it is the list of all options; each command imports what it needs itself.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.cli_shared import (
    AdminKeyOption,
    ConfigOption,
    JsonOption,
    UrlOption,
    end_usage,
    open_client,
    print_json,
    printable,
    told_plainly,
)

stacks_app = typer.Typer(help="Look at and change the stacks of a running server.", no_args_is_help=True)

TierOption = Annotated[
    Literal["device", "host"], typer.Option(help="Memory of the device, or pinned memory beside it.")
]


@stacks_app.command("list")
def list_stacks(
    url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List the registered domains, where they are, what the router knows of them, and damaged files."""
    from rich.console import Console

    from server.terminal_tables import domains_table, router_lines

    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        answer = client.domains()
    if as_json:
        print_json(answer)
        return
    console = Console()
    console.print(domains_table(answer))
    for line in router_lines(answer):
        console.print(line, style="yellow", markup=False, highlight=False)
    for fault in (fault for domain in answer["domains"] for fault in domain.get("damaged_files", ())):
        console.print(f"damaged {fault['file']}: {fault['fault']}", style="red", markup=False, highlight=False)


@stacks_app.command("show")
def show_stack(name: str, url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None) -> None:
    """Show one domain as JSON."""
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        print_json(client.domain(name))


@stacks_app.command("verify")
def verify_stacks(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A store, stack files, or folders that are searched for them. Default: the server's store."
        ),
    ] = None,
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Check every byte: of a running server's domains, or, given paths, of files without a server.

    A store's files are compared with the digests of its manifest. Extra files are told; they are no fault.
    """
    with told_plainly():
        num_faulty = sum(not _verify_path(path) for path in paths) if paths else _verify_server(url, config, admin_key)
    raise typer.Exit(1 if num_faulty else 0)


def _verify_server(url: str | None, config: Path | None, admin_key: str | None) -> int:
    """The number of bad files."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    num_bad = 0
    with (
        open_client(url, config, admin_key=admin_key) as client,
        _progress_above_which_is_told(*columns) as progress,
    ):
        domains = client.domains()["domains"]
        task = progress.add_task("reading", total=sum(domain["bytes"] for domain in domains))
        for domain in domains:
            progress.update(task, description=domain["name"])
            for check in client.verify(domain["name"])["files"]:
                num_bad += check["fault"] is not None
                kind = "good" if check["fault"] is None else "bad"
                _tell(progress, kind, check["file"], check["fault"] or check["digest"])
            progress.advance(task, domain["bytes"])
    return num_bad


def _verify_path(path: Path) -> bool:
    """Whether nothing is bad or missing, and there is something to check."""
    from server.store_check import check_files, check_store, is_store, num_named_files

    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    total = num_named_files(path) if is_store(path) else len(files)
    num_checked = num_wrong = 0
    with _progress_above_which_is_told(transient=True) as progress:
        task = progress.add_task(printable(path.name), total=total)
        for finding in check_store(path) if is_store(path) else check_files(files):
            _tell(progress, finding.kind, finding.file, finding.said)
            num_checked += finding.kind != "extra"
            num_wrong += finding.kind in ("bad", "missing")
            progress.advance(task, finding.kind != "extra")
    if not num_checked:
        typer.secho(f"error: no stack file under {printable(str(path))}", fg="red", err=True)
    return num_checked > 0 and num_wrong == 0


def _progress_above_which_is_told(*columns: Any, transient: bool = False) -> Any:
    """A Progress on the terminal that shows the standard output; if that goes elsewhere, on the other stream."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=not sys.stdout.isatty()), transient=transient)


def _tell(progress: Any, kind: str, file: str, said: str) -> None:
    """On the standard output, above the bar where that is shown there too."""
    line = f"{kind:<8}{printable(file)}: {printable(said)}"
    colour = {"bad": "red", "missing": "red", "extra": "yellow"}.get(kind)
    if progress.console.stderr:
        typer.secho(line, fg=colour)
    else:
        progress.console.print(line, style=colour, markup=False, highlight=False, soft_wrap=True)


@stacks_app.command("push")
def push_stacks(
    name: str,
    files: Annotated[
        list[Path], typer.Argument(help="The domain's stack files, round 1 first; or a store that has it.", exists=True)
    ],
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option(help="Upload and check, but register nothing.")] = False,
) -> None:
    """Upload stack files and register them as a domain."""
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        stacks = [{"sha256": digest} for digest in _upload(client, _stack_files(name, files))]
        answer = client.register(name, stacks, dry_run=dry_run)
    print_json(answer)


@stacks_app.command("push-router")
def push_router(
    file: Annotated[Path, typer.Argument(help="The router file; or a store that has one.", exists=True)],
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Upload a router file and make it the live router."""
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        answer = client.set_router({"sha256": _upload(client, [_router_file(file)])[0]})
    print_json(answer)


def _stack_files(name: str, files: list[Path]) -> list[Path]:
    """The rounds of a domain in a store, or the files that were named. StoreError."""
    if len(files) != 1 or not files[0].is_dir():
        return files
    from stack_store.errors import DomainNotFound

    (store,) = files
    for domain in _manifest(store).domains:
        if domain.name == name:
            return [store / stack.file for stack in domain.stacks]
    raise DomainNotFound(f"store {store} has no domain {name!r}")


def _router_file(path: Path) -> Path:
    """The router of a store, or the file that was named. StoreError."""
    if not path.is_dir():
        return path
    from stack_store.errors import StoreNotFound

    router = _manifest(path).router
    if router is None:
        raise StoreNotFound(f"store {path} has no router")
    return path / router.file


def _manifest(store: Path) -> Any:
    """A Manifest: not named as a type, because its module is imported only here."""
    from stack_store.errors import StoreNotFound
    from stack_store.manifest import read_manifest

    try:
        return read_manifest(store / "manifest.json")
    except FileNotFoundError as error:
        raise StoreNotFound(f"{store} is not a store: it has no manifest.json") from error


def _upload(client: Any, files: Iterable[Path]) -> list[str]:
    """The digest of each, with a bar of its own while it is sent."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    digests = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for file in files:
            task = progress.add_task(printable(file.name), total=file.stat().st_size)
            digests.append(client.upload(file, lambda sent, task=task: progress.advance(task, sent)))
    return digests


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
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client, waiting:
        answer = client.register(name, stacks, dry_run=dry_run)
    print_json(answer)


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
    with told_plainly(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("stacks", total=None)
        report = run_import(plan, lambda done, total: progress.update(task, completed=done, total=total))
    for line in report.lines():
        typer.echo(line)


@stacks_app.command("remove")
def remove_stacks(
    name: str, url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None
) -> None:
    """Delete a domain; requests that use it finish."""
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        print_json(client.remove(name))


@stacks_app.command("pin")
def pin_stacks(
    name: str,
    tier: TierOption = "device",
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Load a domain into a tier and keep it there."""
    _change_residency("pin", name, tier, url, config, admin_key)


@stacks_app.command("unpin")
def unpin_stacks(
    name: str,
    tier: TierOption = "device",
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Let a domain be evicted from a tier again."""
    _change_residency("unpin", name, tier, url, config, admin_key)


@stacks_app.command("prefetch")
def prefetch_stacks(
    name: str,
    tier: TierOption = "device",
    url: UrlOption = None,
    admin_key: AdminKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Start to load a domain into a tier, without keeping it there."""
    _change_residency("prefetch", name, tier, url, config, admin_key)


def _change_residency(
    action: str, name: str, tier: str, url: str | None, config: Path | None, admin_key: str | None
) -> None:
    from rich.console import Console

    waiting = Console(stderr=True).status(f"{action} {name}")
    with told_plainly(), open_client(url, config, admin_key=admin_key) as client, waiting:
        answer = client.change_residency(name, action, tier=tier)
    print_json(answer)


@stacks_app.command("cache")
def show_cache(
    url: UrlOption = None, admin_key: AdminKeyOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Show what is resident, leased, pinned and loading, by tier."""
    from rich.console import Console

    from server.terminal_tables import cache_tables

    with told_plainly(), open_client(url, config, admin_key=admin_key) as client:
        answer = client.cache()
    if as_json:
        print_json(answer)
        return
    for table in cache_tables(answer):
        Console().print(table)


def _parse_object(text: str) -> dict[str, str]:
    url, _, sha256 = text.rpartition("@")
    if not url or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        end_usage("an object is URL@SHA256 with 64 lower-case hex digits at the end")  # the URL may hold a secret
    return {"url": url, "sha256": sha256}
