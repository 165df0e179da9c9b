"""What the commands of the command line share: options, the client, errors told plainly. Imports nothing heavy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="The server; default: host and port of the settings.")]
ApiKeyOption = Annotated[str | None, typer.Option("--api-key", help="Default: the first of the settings.")]
AdminKeyOption = Annotated[str | None, typer.Option("--admin-key", help="Default: the one of the settings.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the keys that it is asked with."""

    url: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


@contextmanager
def told_plainly() -> Iterator[None]:
    """An error that was raised on purpose, or by the system, is one line and exit status 1, not a traceback."""
    from engine.errors import EngineError
    from router.errors import RouterError
    from server.errors import ServerError
    from stack_store.errors import StoreError

    try:
        yield
    except BrokenPipeError:  # who read the output has gone
        raise
    except (ServerError, EngineError, RouterError, StoreError, OSError) as error:
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


def address(
    url: str | None, config: Path | None, *, api_key: str | None = None, admin_key: str | None = None
) -> Address:
    """What was given, else what the settings say. ConfigInvalid."""
    import httpx

    from server.config import load_settings
    from server.errors import ConfigInvalid

    server = load_settings(config).server
    where = url or _url_of(server.host, server.port)
    try:
        httpx.URL(where)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigInvalid(f"the server's address {where!r}: {error}") from error
    return Address(where, api_key or next(iter(server.api_keys), None), admin_key or server.admin_key)


def _url_of(host: str, port: int) -> str:
    """Of a server on this machine; who listens on all addresses is asked at the machine's own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - asked, not listened on
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def open_client(
    url: str | None, config: Path | None, *, api_key: str | None = None, admin_key: str | None = None
) -> Iterator[Any]:
    """A ServerClient: not named as a type, because its module is imported only here."""
    from server.client import ServerClient

    where = address(url, config, api_key=api_key, admin_key=admin_key)
    with ServerClient(where.url, api_key=where.api_key, admin_key=where.admin_key) as client:
        yield client
