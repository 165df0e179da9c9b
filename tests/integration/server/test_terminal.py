"""The commands that talk to a running server."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.client import EventReader, ServerClient
from server.errors import RequestFailed
from tests.fakes import tiny_header, write_random_stack
from tests.integration.server.conftest import ADMIN_KEY
from tests.servers import ANSWER, LiveServer, ScriptedRouter, make_store, run_live_server, wait_until
from tests.terminals import Terminal

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


def test_commands_of_the_chat_change_the_mix(server: LiveServer) -> None:
    lines = [
        "/mix code=0.5 math=0.25",
        "one",
        "/base",
        "two",
        "/mix auto",
        "math=0.9",
        "//three",
        "/mix",
        "/quit",
        "no",
    ]
    result = run(server, "chat", "--max-tokens", "20", text="\n".join(lines))
    mixes = [{domain.name: weight for domain, weight in request.mix} for request in server.engine.submitted]
    assert mixes == [{"code": 0.5, "math": 0.25}, {}, {"math": 0.9, "chat": 0.2}, {"chat": 0.2}]
    said = ["answers come from code=0.50 math=0.25", "answers come from the base alone", "the router decides"]
    assert [line for line in result.stdout.splitlines() if line in said] == [*said, said[-1]]
    last = server.service.reader.decode(server.engine.submitted[-1].prompt_ids)
    assert last.startswith("<|user|>one\n")
    assert "<|user|>/three\n" in last


def test_new_conversation_forgets(server: LiveServer) -> None:
    run(server, "chat", text="one\n/new\ntwo\n")
    assert "one" not in server.service.reader.decode(server.engine.submitted[1].prompt_ids)


def test_what_is_wrong_with_a_command_is_named_and_asks_nothing(server: LiveServer) -> None:
    lines = ["/mxi auto", "/mix law=1", "/mix math:1", "/mix math=2", "/route", "/help"]
    shown = " ".join(run(server, "chat", text="\n".join(lines)).stdout.split())
    assert "there is no command /mxi; /help lists them" in shown
    assert "the server has no domain law; it has chat, code, math" in shown
    assert "a mix is DOMAIN=WEIGHT, got 'math:1'" in shown
    assert "a weight from 0 to 1, got 'math=2'" in shown
    assert "which text? /route TEXT" in shown
    assert "/quit end; so does Ctrl-D" in shown
    assert not server.engine.submitted


def test_chat_shows_routes_and_stacks(keyed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(keyed, "chat", text="/route math=0.9\n/stacks\n").stdout
    assert "0.900" in shown
    assert "absent" in shown
    monkeypatch.delenv("BRAINSTACKS_SERVER__ADMIN_KEY")
    assert run(keyed, "chat", text="/stacks\n").stdout == "chat code math\n"


def test_ctrl_c_stops_the_answer_but_not_the_chat(server: LiveServer) -> None:
    server.engine.may_decode.clear()
    with Terminal(sys.executable, "-m", "server.cli", "chat", "--url", server.url) as terminal:
        terminal.wait_for("you ")
        terminal.type("hello\n")
        terminal.wait_for(ANSWER[0], behind="hello")
        terminal.interrupt(until="stopped")
        wait_until(lambda: bool(server.engine.cancelled), what="the answer was cancelled")
        server.engine.may_decode.set()
        terminal.wait_for("you ", behind="stopped")
        terminal.interrupt(until="/quit or Ctrl-D ends")  # at the prompt
        terminal.type("/mix law=1\n")
        terminal.wait_for("has no domain law")
        terminal.type("again\n")
        terminal.wait_for("mix chat=0.20", behind="again")
        terminal.type("/quit\n")
        assert terminal.status() == 0
    prompt = server.service.reader.decode(server.engine.submitted[-1].prompt_ids)
    assert prompt == f"<|user|>hello\n<|assistant|>{ANSWER[0]}\n<|user|>again\n<|assistant|>"


def test_answer_that_breaks_off_ends_its_line_and_stays_in_the_conversation(server: LiveServer) -> None:
    server.engine.fail_with = RuntimeError("broken")
    failed = run(server, "chat", text="hello\n", status=1)
    assert failed.stdout == f"{ANSWER[0]}\n"
    assert failed.stderr.startswith("error: ")
    with Terminal(sys.executable, "-m", "server.cli", "chat", "--url", server.url) as terminal:
        terminal.wait_for("you ")
        terminal.type("hello\n")
        terminal.wait_for(f"{ANSWER[0]}\r\nerror: ")
        server.engine.fail_with = None
        terminal.type("again\n")
        terminal.wait_for("mix chat=0.20")
        terminal.type("/quit\n")
        assert terminal.status() == 0
    prompt = server.service.reader.decode(server.engine.submitted[-1].prompt_ids)
    assert prompt == f"<|user|>hello\n<|assistant|>{ANSWER[0]}\n<|user|>again\n<|assistant|>"


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_line_is_edited_and_of_any_length(server: LiveServer, kind: str) -> None:
    with Terminal(sys.executable, "-m", "server.cli", "chat", "--url", server.url, kind=kind) as terminal:
        terminal.wait_for("you ")
        terminal.type("x" * 6000 + "\n")
        terminal.wait_for(f"has {6000 + len('<|user|>' + '<|assistant|>') + 1} ")  # too long to be answered
        assert "\x01" not in terminal.shown
        terminal.type("hell\x1b[D\x1b[De\x7fE\n")
        terminal.wait_for("mix chat=0.20")
        terminal.type("/quit\n")
        assert terminal.status() == 0
    (request,) = server.engine.submitted
    assert server.service.reader.decode(request.prompt_ids) == "<|user|>heEll\n<|assistant|>"


def test_ctrl_c_ends_a_chat_that_nobody_sits_at(server: LiveServer, tmp_path: Path) -> None:
    server.engine.may_decode.clear()
    (tmp_path / "questions").write_text("one\ntwo\n")
    command = f"{sys.executable} -m server.cli chat --url {server.url} < {tmp_path / 'questions'}; echo status $?"
    with Terminal("bash", "-c", f"trap : INT; {command}") as terminal:
        terminal.wait_for(ANSWER[0])
        terminal.interrupt(until="status 130")
        terminal.status()
    assert len(server.engine.submitted) == 1


def test_ctrl_c_stops_a_command_but_not_the_chat() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Terminal(sys.executable, "-m", "server.cli", "chat", "--url", url) as terminal:
            terminal.wait_for("you ")
            terminal.type("/route hello\n")
            with silent.accept()[0]:
                terminal.interrupt(until="stopped")
                terminal.type("/quit\n")
                assert terminal.status() == 0


def test_answer_that_was_cut_says_so(server: LiveServer) -> None:
    assert "cut at --max-tokens" in run(server, "chat", "--max-tokens", "3", text="hello\n").stdout
    assert "cut" not in run(server, "chat", "--max-tokens", "300", text="hello\n").stdout


def test_answer_is_shown_as_written_and_steers_nothing(tmp_path: Path) -> None:
    with run_live_server(tmp_path, answer="a\tb\r\x1b[31mc\x9b\nd\u202ee\u2069") as server:
        shown = run(server, "chat", text="hello\n/\x1b[31mx\n").stdout
    assert shown.startswith("a\tb\\x0d\\x1b[31mc\\x9b\nd\\u202ee\\u2069\n")
    assert "no command /\\x1b[31mx" in shown
    assert "\x1b" not in shown


def test_what_a_terminal_cannot_show_is_a_question_mark(tmp_path: Path) -> None:
    with run_live_server(tmp_path, answer="caf\xe9") as server:
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", "chat", "--url", server.url],
            input=b"hello\n",
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, b"caf?"), done.stderr.decode()


@contextmanager
def answering(*lines: str) -> Iterator[str]:
    """The address of something that answers every request with these lines, and is no server of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.wfile.write("\r\n".join(lines).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as foreign:
        thread = threading.Thread(target=foreign.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{foreign.server_port}"
        foreign.shutdown()
        thread.join()


MOVED = ("HTTP/1.1 301 Moved Permanently", "location: /", "content-length: 0", "", "")
PAGE = ("HTTP/1.1 200 OK", "content-type: text/html", "content-length: 4", "", "<p/>")
CHUNK = 'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": null}]}'
EVENTS = ("HTTP/1.1 200 OK", "content-type: text/event-stream", "")


@pytest.mark.parametrize(
    ("command", "answer", "words"),
    [
        (["route", "hello"], MOVED, "301 Moved Permanently"),
        (["chat"], MOVED, "301 Moved Permanently"),
        (["bench"], MOVED, "301 Moved Permanently"),
        (["route", "hello"], PAGE, "no JSON object: '<p/>'"),
        (["chat"], PAGE, "content type 'text/html'"),
        (["bench"], PAGE, "content type 'text/html'"),
        (["chat"], (*EVENTS, CHUNK, ""), "did not end with [DONE]"),
        (["bench"], (*EVENTS, CHUNK, ""), "did not end with [DONE]"),
        (["chat"], (*EVENTS, "data: <p/>", ""), "is no chunk: '<p/>'"),
        (["bench"], (*EVENTS, "data: {}", ""), "is no chunk: '{}'"),
    ],
)
def test_answer_of_something_else_is_one_line_and_status_1(
    command: list[str], answer: tuple[str, ...], words: str
) -> None:
    with answering(*answer) as url:
        result = runner.invoke(app, [*command, "--url", url], input="hello\n")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: "), result.exception
    assert words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_only_a_line_feed_ends_an_event(command: str, tmp_path: Path) -> None:
    answer = "a\u2028b\u2029c\x85d"
    with run_live_server(tmp_path, answer=answer) as server:
        shown = run(server, command, text="hello\n").stdout
    if command == "chat":
        assert shown.startswith("a\u2028b\u2029c\\x85d\n")


def test_the_last_line_of_a_stream_needs_no_end() -> None:
    events = EventReader()
    assert list(events.read(b'data: {"choices": []}\n\ndata: [DO')) == [{"choices": []}]
    with pytest.raises(RequestFailed, match="did not end"):
        events.require_end()
    assert list(events.read(b"NE]")) == []
    events.require_end()


def test_nothing_is_said_of_a_mix_that_was_not_told() -> None:
    with answering(*EVENTS, CHUNK, "", "data: [DONE]", "") as url:
        result = runner.invoke(app, ["chat", "--url", url], input="hello\n")
    assert (result.exit_code, result.stdout) == (0, "x\n")


def test_refusal_leaves_a_person_in_the_chat(tmp_path: Path) -> None:
    with (
        run_live_server(tmp_path, settings={"server": {"api_keys": ["secret"]}}) as server,
        Terminal(sys.executable, "-m", "server.cli", "chat", "--url", server.url) as terminal,
    ):
        terminal.wait_for("you ")
        terminal.type("hello\n")
        terminal.wait_for("API key is missing")
        terminal.type("\x04")
        assert terminal.status() == 0


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


@pytest.mark.parametrize("name", ["math#old", "math?x=1", "math/../math", "math/"])
def test_name_is_taken_whole(keyed: LiveServer, name: str) -> None:
    assert name in run(keyed, "stacks", "remove", name, status=1).stderr
    assert name in run(keyed, "stacks", "pin", name, status=1).stderr
    assert keyed.registry.domain("math").name == "math"


def test_upload_shows_how_far_it_is(keyed: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "law.safetensors"
    write_random_stack(file, tiny_header(domain="law"), seed=1)
    with Terminal(
        sys.executable, "-m", "server.cli", "stacks", "push", "law", str(file), "--url", keyed.url
    ) as terminal:
        terminal.wait_for(f"{file.stat().st_size / 1000:.1f}/{file.stat().st_size / 1000:.1f} kB", behind=file.name)
        terminal.wait_for('"name": "law"')
        assert terminal.status() == 0


def test_upload_tells_of_every_byte(keyed: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    file.write_bytes(b"x" * 2_500_000)
    sent: list[int] = []
    with ServerClient(keyed.url, admin_key=ADMIN_KEY) as client:
        client.upload(file, sent.append)
    assert len(sent) > 1
    assert sum(sent) == 2_500_000


def test_administrator_waits_as_long_as_it_takes(keyed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.client.TIMEOUT", httpx.Timeout(5.0, read=0.05))
    keyed.may_load.clear()
    opens = threading.Timer(0.5, keyed.may_load.set)
    opens.start()
    assert json.loads(run(keyed, "stacks", "pin", "math").stdout)["pinned"] is True
    opens.join()


def test_domain_and_router_of_a_store_are_pushed(keyed: LiveServer, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", tmp_path / "sources", domains=("law", "tax"))
    router = tmp_path / "sources" / "law.safetensors"  # any sound file; the stand-in loader looks up what it is
    other.set_router(router)
    keyed.routers[router.read_bytes()[-8:].hex()] = ScriptedRouter(("law",))
    other.close()
    assert json.loads(run(keyed, "stacks", "push", "tax", str(tmp_path / "other")).stdout)["name"] == "tax"
    assert keyed.registry.domain("tax").version == other.domain("tax").version
    assert "has no domain 'math'" in run(keyed, "stacks", "push", "math", str(tmp_path / "other"), status=1).stderr
    assert "is not a store" in run(keyed, "stacks", "push", "math", str(tmp_path / "sources"), status=1).stderr
    answer = json.loads(run(keyed, "stacks", "push-router", str(tmp_path / "other")).stdout)
    assert answer["router"]["digest"] == hashlib.sha256(router.read_bytes()).hexdigest()


def test_list_shows_what_the_router_knows(keyed: LiveServer) -> None:
    keyed.router.stack_digests = {"math": tuple(stack.digest for stack in keyed.registry.domain("math").stacks)}
    keyed.router.stack_digests["code"] = ("0" * 64,)
    listed = run(keyed, "stacks", "list").stdout
    rows = {line.split()[0]: line for line in listed.splitlines() if line.strip()}
    for domain, known in (("math", "trained"), ("code", "stale"), ("chat", "unknown")):
        assert known in rows[domain], listed


def test_server_verifies_its_domains_and_names_a_damaged_file(keyed: LiveServer) -> None:
    assert run(keyed, "stacks", "verify").stdout.count("good") == 3
    stack = keyed.registry.domain("math").stacks[0]
    path = keyed.registry.stack_path(stack)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run(keyed, "stacks", "verify", status=1)
    assert f"bad     {stack.file}: has the digest" in result.stdout
    assert "1 damaged" in run(keyed, "stacks", "list").stdout
    assert f"damaged {stack.file}" in " ".join(run(keyed, "stacks", "list").stdout.split())


def test_domain_is_prefetched_pinned_shown_in_the_cache_and_unpinned(keyed: LiveServer) -> None:
    assert json.loads(run(keyed, "stacks", "prefetch", "code").stdout)["state"] in ("loading", "resident")
    assert json.loads(run(keyed, "stacks", "pin", "math").stdout)["pinned"] is True
    assert "math" in run(keyed, "stacks", "cache").stdout
    entries = json.loads(run(keyed, "stacks", "cache", "--json").stdout)["entries"]
    assert {entry["key"].partition("@")[0]: entry["pinned"] for entry in entries} == {"code": False, "math": True}
    assert json.loads(run(keyed, "stacks", "unpin", "math").stdout)["pinned"] is False
    assert "no host tier" in run(keyed, "stacks", "pin", "math", "--tier", "host", status=1).stderr


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


def test_bench_asks_what_no_other_run_asked_unless_it_has_the_same_seed(server: LiveServer) -> None:
    seeds = []
    for options in ([], [], ["--seed", "3"], ["--seed", "3"]):
        result = run(server, "bench", "--requests", "2", "--max-tokens", "1", "--json", *options)
        seeds.append(json.loads(result.stdout)["seed"])
    assert seeds[2:] == [3, 3]
    asked = [tuple(request.prompt_ids) for request in server.engine.submitted]
    runs = [set(asked[begin : begin + 2]) for begin in range(0, 8, 2)]
    assert not runs[0] & runs[1]
    assert runs[2] == runs[3]


def test_bench_asks_at_a_rate_whatever_the_answers_take(server: LiveServer) -> None:
    result = run(server, "bench", "--requests", "6", "--rate", "40", "--max-tokens", "3", "--json", "--prompt", "hello")
    figures = json.loads(result.stdout)
    assert figures["load"] == {"rate": 40.0}
    assert figures["answered"] == 6
    assert figures["routes"]["router"]["first_token_seconds"]["p99"] > 0


def test_refusal_ends_a_bench_and_a_chat(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"api_keys": ["secret"]}}) as server:
        assert "API key is missing" in run(server, "bench", "--requests", "1", status=1).stderr
        assert "API key is missing" in run(server, "chat", text="hello\n", status=1).stderr
        run(server, "chat", "--api-key", "secret", text="hello\n")
