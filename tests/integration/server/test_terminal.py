"""The commands that talk to a running server."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from tests.fakes import tiny_header, write_random_stack
from tests.integration.server.conftest import ADMIN_KEY
from tests.servers import ANSWER, LiveServer, run_live_server

runner = CliRunner()


def run(server: LiveServer, *arguments: str, text: str | None = None, status: int = 0) -> Result:
    """A command against the server; its exit status is checked."""
    result = runner.invoke(app, [*arguments, "--url", server.url], input=text)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def keyed(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    """The admin key is in the environment, as on the server's own machine."""
    monkeypatch.setenv("BRAINSTACKS_SERVER__ADMIN_KEY", ADMIN_KEY)
    return server


def test_chat_streams_remembers_and_shows_the_mix(server: LiveServer) -> None:
    result = run(server, "chat", text="math=0.9\nagain\n\n")
    assert result.stdout.count(ANSWER) == 2
    assert "mix math=0.90 chat=0.20  cold" in result.stdout
    prompt = server.service.reader.decode(server.engine.submitted[1].prompt_ids)
    assert prompt == f"<|user|>math=0.9\n<|assistant|>{ANSWER}\n<|user|>again\n<|assistant|>"


def test_chat_forces_a_mix(server: LiveServer) -> None:
    run(server, "chat", "--mix", "code=0.5", "--mix", "math=0.25", text="hello\n")
    assert {domain.name: weight for domain, weight in server.engine.submitted[0].mix} == {"code": 0.5, "math": 0.25}


def test_route_shows_scores_and_weights(server: LiveServer) -> None:
    assert "0.900" in run(server, "route", "math=0.9").stdout
    answer = json.loads(run(server, "route", "math=0.9", "--json").stdout)
    assert answer["mix"] == {"chat": 0.2, "math": 0.9}


def test_stacks_are_pushed_listed_shown_and_removed(keyed: LiveServer, tmp_path: Path) -> None:
    files = []
    for round in (1, 2):
        files.append(str(tmp_path / f"{round}.safetensors"))
        write_random_stack(Path(files[-1]), tiny_header(domain="law", round=round), seed=round)
    assert json.loads(run(keyed, "stacks", "push", "law", *files, "--dry-run").stdout)["dry_run"] is True
    assert len(json.loads(run(keyed, "stacks", "push", "law", *files).stdout)["stacks"]) == 2
    assert "law" in run(keyed, "stacks", "list").stdout
    shown = json.loads(run(keyed, "stacks", "show", "law").stdout)
    assert shown["version"] == keyed.registry.domain("law").version
    assert json.loads(run(keyed, "stacks", "remove", "law").stdout)["status"] == "deleted"
    assert "no domain 'law'" in run(keyed, "stacks", "show", "law", status=1).stderr


def test_wrong_key_is_said(server: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    file.write_bytes(b"x" * 20_000_000)
    result = run(server, "stacks", "push", "law", str(file), "--admin-key", "wrong", status=1)
    assert "admin key is missing or wrong" in result.stderr


def test_bench_prints_figures_in_all_and_by_route(server: LiveServer) -> None:
    routes = ["--route", "math=1", "--route", "base"]
    result = run(server, "bench", "--requests", "4", "--clients", "2", "--max-tokens", "5", *routes)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["completion_tokens"] == 20
    assert figures["tokens_per_second"] > 0
    assert [figures["routes"][name]["answered"] for name in ("math=1", "base")] == [2, 2]
    assert sorted(bool(request.mix) for request in server.engine.submitted) == [False, False, True, True]
    assert len({tuple(request.prompt_ids) for request in server.engine.submitted}) == 4


def test_bench_has_one_client_unless_told_otherwise(server: LiveServer) -> None:
    figures = json.loads(run(server, "bench", "--requests", "2", "--max-tokens", "3", "--json").stdout)
    assert figures["load"] == {"clients": 1}


def test_bench_asks_at_a_rate_whatever_the_answers_take(server: LiveServer) -> None:
    result = run(server, "bench", "--requests", "6", "--rate", "40", "--max-tokens", "3", "--json", "--prompt", "hello")
    figures = json.loads(result.stdout)
    assert figures["load"] == {"rate": 40.0, "seed": 0}
    assert figures["answered"] == 6
    assert figures["routes"]["router"]["first_token_seconds"]["p99"] > 0


def test_refusal_ends_a_bench_and_a_chat(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"api_keys": ["secret"]}}) as server:
        assert "API key is missing" in run(server, "bench", "--requests", "1", status=1).stderr
        assert "API key is missing" in run(server, "chat", text="hello\n", status=1).stderr
        run(server, "chat", "--api-key", "secret", text="hello\n")
