"""What the commands of the command line share: options, the client, errors told plainly. Imports nothing heavy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="The server; default: host and port of the settings.")]
ApiKeyOption = Annotated[str | None, typer.Option("--api-key", help="Default: the first of the settings.")]
AdminKeyOption = Annotated[str | None, typer.Option("--admin-key", help="Default: the one of the settings.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def told_plainly() -> Iterator[None]:
    """An error that was raised on purpose is one line and exit status 1, not a traceback."""
    from engine.errors import EngineError
    from router.errors import RouterError
    from server.errors import ServerError
    from stack_store.errors import StoreError

    try:
        yield
    except (ServerError, EngineError, RouterError, StoreError) as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        raise typer.Exit(1) from error


def printable(text: str) -> str:
    """In one line. A message may quote a file of a stranger's, which must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def end_usage(message: str) -> NoReturn:
    """The command was called wrongly: one line and exit status 2."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(2) from None


def print_json(answer: Any) -> None:
    """For people and programs."""
    typer.echo(json.dumps(answer, indent=2))


def address(url: str | None, config: Path | None, api_key: str | None) -> tuple[str, str | None]:
    """Where the server is, and an API key for it. ConfigInvalid."""
    from server.config import load_settings

    server = load_settings(config).server
    return url or f"http://{server.host}:{server.port}", api_key or next(iter(server.api_keys), None)


@contextmanager
def open_client(
    url: str | None, config: Path | None, *, api_key: str | None = None, admin_key: str | None = None
) -> Iterator[Any]:
    """A ServerClient: not named as a type, because its module is imported only here."""
    from server.client import ServerClient
    from server.config import load_settings

    where, key = address(url, config, api_key)
    with ServerClient(where, api_key=key, admin_key=admin_key or load_settings(config).server.admin_key) as client:
        yield client
