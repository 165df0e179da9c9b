"""The command line: quick help, clear errors, checks without a server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli_shared import address
from server.cli_stacks import stacks_app
from server.terminal_chat import describe_report
from tests.fakes import tiny_header, write_random_stack

DEMO_STORE = Path(__file__).parents[3] / "demo" / "store"

runner = CliRunner()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from server.cli import app\n"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'httpx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_talking_to_a_server_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "import server.client, server.bench, server.terminal_chat, server.config\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_server_process_decides_about_threads_before_torch_is_imported() -> None:
    code = "import sys\nimport server.serve\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments",
    [["route", "hello"], ["chat"], ["stacks", "list"], ["bench", "--requests", "1"], ["stacks", "remove", "a"]],
)
def test_absent_server_is_one_line_and_status_1(arguments: list[str]) -> None:
    result = runner.invoke(app, [*arguments, "--url", "http://127.0.0.1:9"], input="hello\n")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stacks", "push", "law", "/etc", "/etc"], "Is a directory: '/etc'"),
        (["chat", "--temperature", "nan"], "not JSON compliant"),
        (["route", "caf\udce9"], "surrogates not allowed"),
        (["route", "hello", "--api-key", "schl\u00fcssel"], "a key has characters that are not ASCII"),
        (["bench", "--api-key", "schl\u00fcssel"], "a key has characters that are not ASCII"),
        (["stacks", "list", "--admin-key", "schl\u00fcssel"], "a key has characters that are not ASCII"),
        (["bench", "--prompt", "caf\udce9"], "surrogates not allowed"),
    ],
)
def test_what_cannot_be_sent_is_one_line_and_status_1(arguments: list[str], words: str) -> None:
    require_one_line(runner.invoke(app, [*arguments, "--url", "http://127.0.0.1:9"], input="hello\n"), words)


def test_input_that_is_no_text_is_one_line_and_status_1() -> None:
    require_one_line(runner.invoke(app, ["chat"], input=b"caf\xe9\n"), "the input is not utf-8")


@pytest.mark.parametrize("command", [["route", "hello"], ["bench"]])
def test_address_that_is_none_is_one_line_and_status_1(command: list[str]) -> None:
    require_one_line(runner.invoke(app, [*command, "--url", "http://[::1"]), "address 'http://[::1'")


def test_store_without_its_file_is_one_line_and_status_1(tmp_path: Path) -> None:
    shutil.copy(DEMO_STORE / "manifest.json", tmp_path)
    require_one_line(runner.invoke(app, ["stacks", "push", "math", str(tmp_path)]), f"'{tmp_path}/domains/math/1-")


def require_one_line(result: Result, words: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: "), result.exception
    assert words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("localhost", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
    ],
)
def test_server_of_the_settings_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__HOST", host)
    assert address(None, None).url == url


def test_bad_setting_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__PROT", "1")
    result = runner.invoke(app, ["serve"])
    assert result.exit_code == 1
    assert "BRAINSTACKS_SERVER__PROT: unknown key 'prot'" in result.stderr


def test_verify_tells_good_files_from_bad(tmp_path: Path) -> None:
    digest = write_random_stack(tmp_path / "good.safetensors", tiny_header(domain="math"))
    good = runner.invoke(app, ["stacks", "verify", str(tmp_path)])
    assert good.exit_code == 0
    assert f"domain=math round=1 digest={digest}" in good.stdout
    (tmp_path / "bad.safetensors").write_bytes(b"junk")
    both = runner.invoke(app, ["stacks", "verify", str(tmp_path)])
    assert both.exit_code == 1
    assert "bad.safetensors" in both.stdout


def test_mistyped_mix_is_named() -> None:
    result = runner.invoke(app, ["bench", "--route", "math:1"])
    assert result.exit_code == 2
    assert "DOMAIN=WEIGHT, got 'math:1'" in result.stderr


def test_two_kinds_of_load_exclude_each_other() -> None:
    result = runner.invoke(app, ["bench", "--clients", "2", "--rate", "3"])
    assert result.exit_code == 2
    assert "--clients and --rate exclude each other" in result.stderr


def test_report_is_one_line() -> None:
    report = {"mix": {"chat": 0.2, "math": 0.93}, "cold": ["math"], "scores": {"math": 0.93, "chat": 0.01}}
    assert describe_report(report) == "mix math=0.93 chat=0.20  cold math  scores math=0.93 chat=0.01"
    assert describe_report({"mix": {}}) == "mix base only"


@pytest.mark.parametrize("text", ["s3://b/law", "s3://KEY:SECRET@b/law", f"@{'0' * 64}", f"s3://b/law@{'0' * 63}"])
def test_object_without_digest_is_refused_before_anything_is_asked(text: str) -> None:
    result = runner.invoke(app, ["stacks", "register", "law", text])
    assert result.exit_code == 2
    assert "an object is URL@SHA256" in result.stderr
    assert "SECRET" not in result.stderr


def test_page_of_the_command_line_has_every_command() -> None:
    page = (Path(__file__).parents[3] / "docs" / "terminal.md").read_text()
    assert [name for name in _commands(app) if f"brainstacks {name}" not in page] == []
    assert [name for name in _commands(stacks_app) if not re.search(rf"^\|.*`{name}[` ]", page, re.MULTILINE)] == []


def _commands(group: typer.Typer) -> list[str]:
    return [command.name or command.callback.__name__ for command in group.registered_commands if command.callback]
