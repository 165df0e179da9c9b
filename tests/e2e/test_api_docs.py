"""The API's page: every example runs, in a shell and in Python, and together they call every endpoint there is."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.error_table import error_table
from tests.documentation import ROOT, Page
from tests.e2e.server_process import ADMIN_KEY, ServerProcess

pytestmark = pytest.mark.e2e

KEY = "test-api-key"
CALL = re.compile(r"request done method=(\w+) endpoint=(\S+) status=(\d+)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(ROOT / "demo" / "store", folder / "store")
    settings = {"server__api_keys": KEY, "server__requests_per_minute": 600, "log__level": "debug"}
    with ServerProcess(folder / "store", folder / "log", **settings) as process:
        yield process


def endpoints(server: ServerProcess) -> set[tuple[str, str]]:
    """Method and path of everything that the server documents."""
    paths = server.http.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


def called(log: str) -> dict[tuple[str, str], set[int]]:
    """The statuses with which each endpoint was answered."""
    found: dict[tuple[str, str], set[int]] = {}
    for method, path, status in CALL.findall(log):
        found.setdefault((method, path.replace(":path}", "}")), set()).add(int(status))
    return found


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page exports them."""
    monkeypatch.setenv("KEY", KEY)
    monkeypatch.setenv("ADMIN_KEY", ADMIN_KEY)


def test_examples_in_a_shell_call_every_endpoint(server: ServerProcess, tmp_path: Path) -> None:
    before = len(server.log_text)
    shown = Page("api.md", server.url).run_bash(tmp_path, times=2)
    calls = called(server.log_text[before:])
    assert endpoints(server) - calls.keys() == set()
    assert all(statuses <= {200, 201} for statuses in calls.values()), calls
    assert json.loads(shown[1])["brainstacks"]["mix"] == {"medical": 0.9, "chat": 0.2}
    assert shown[2].strip().endswith("data: [DONE]")
    assert any('{"prompt":"Seven boxes"}' in text for text in shown)
    assert any("x-ratelimit-remaining-requests" in text for text in shown)


def test_examples_in_python_call_every_endpoint(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(server.log_text)
    names = Page("api.md", server.url).run_python()
    for client in ("client", "http", "admin"):
        names[client].close()
    calls = called(server.log_text[before:])
    assert endpoints(server) - calls.keys() == set()
    assert "domain_not_found" in capsys.readouterr().out
    assert names["cache"]["host"] is None
    assert names["tokens"]["count"] > 0
    assert {domain.name for domain in (server.store / "domains").iterdir()} >= {"chat", "reasoning"}


def test_every_error_is_in_the_table_as_the_code_has_it() -> None:
    assert error_table() in (ROOT / "docs" / "api.md").read_text()
