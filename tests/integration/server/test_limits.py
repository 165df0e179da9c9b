"""Limits of rate and time over a running server."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.server.test_lifecycle import asked, assert_nothing_is_left, is_decoding, num_499
from tests.servers import ANSWER, WAIT_SECONDS, LiveServer, run_live_server, wait_until

BODY = {"messages": [{"role": "user", "content": "hello"}]}
PROMPT_TOKENS = len("<|user|>hello\n<|assistant|>")
ANSWER_TOKENS = len(ANSWER.encode())
both_ways = pytest.mark.parametrize("stream", [False, True])


def with_limits(**limits: object) -> dict[str, dict[str, object]]:
    return {"server": {"api_keys": ["a", "b"], "admin_key": "boss", **limits}}


def left(server: LiveServer, kind: str, key: str = "a") -> int:
    """What the next answer says is left."""
    with server.client(key) as client:
        return int(client.post("/tokenize", json={"prompt": "x"}).headers[f"x-ratelimit-remaining-{kind}"])


def test_nothing_is_limited_by_default(server: LiveServer) -> None:
    answers = [server.chat() for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]


def test_request_too_many_is_refused_and_told_when_to_come_back(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings=with_limits(requests_per_minute=3)) as server:
        with server.client("a") as client:
            answers = [client.post("/v1/chat/completions", json=BODY) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
            rest = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
            assert rest == ["2", "1", "0", "0"]
            refused = answers[3]
            error = refused.json()["error"]
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert 15 <= int(refused.headers["retry-after"]) <= 20
            assert refused.headers["x-ratelimit-limit-requests"] == "3"
            assert "x-ratelimit-limit-tokens" not in refused.headers
            assert client.get("/v1/models").status_code == 200  # costs nothing
            for path in ("/v1/completions", "/v1/route", "/tokenize", "/detokenize"):
                assert client.post(path, content=b"{").status_code == 429, "refused before it is read"
        with server.client("b") as client:
            assert client.post("/v1/chat/completions", json=BODY).status_code == 200  # a key of its own
        with server.client("boss") as client:
            assert {client.get("/admin/domains").status_code for _ in range(5)} == {200}
        with server.client() as client:
            assert {client.get("/health/ready").status_code for _ in range(5)} == {200}
        assert len(server.engine.submitted) == 4
        assert server.metric("brainstacks_rate_limited_total", limit="requests") == 5
        assert server.metric("brainstacks_rate_limited_total", limit="tokens") == 0


def test_without_keys_the_address_is_counted(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"requests_per_minute": 2}}) as server:
        statuses: list[int] = []
        for key in (None, "one", "two"):  # a made-up key makes nobody somebody else
            with server.client(key) as client:
                forwarded = {"x-forwarded-for": f"10.0.0.{len(statuses)}"}  # no proxy is trusted
                statuses.append(client.post("/tokenize", json={"prompt": "x"}, headers=forwarded).status_code)
    assert statuses == [200, 200, 429]


def test_trusted_proxy_names_the_client(tmp_path: Path) -> None:
    settings = {"server": {"requests_per_minute": 1, "trusted_proxies": ["127.0.0.1"]}}
    with run_live_server(tmp_path, settings=settings) as server, server.client() as client:

        def status(address: str) -> int:
            headers = {"x-forwarded-for": address}
            return client.post("/tokenize", json={"prompt": "x"}, headers=headers).status_code

        assert [status("10.0.0.1"), status("10.0.0.1"), status("10.0.0.2")] == [200, 429, 200]
        # Whoever has one address of a network of 64 bits has them all.
        assert [status("2001:db8::1"), status("2001:db8::ffff:2"), status("2001:db8:0:1::1")] == [200, 429, 200]


@both_ways
def test_tokens_of_an_answer_are_taken_from_its_client(tmp_path: Path, stream: bool) -> None:
    with run_live_server(tmp_path, settings=with_limits(tokens_per_minute=10_000)) as server:
        before = left(server, "tokens")
        with server.client("a") as client:
            assert client.post("/v1/chat/completions", json={**BODY, "stream": stream}).status_code == 200
        used = before - left(server, "tokens")
        assert 0 <= PROMPT_TOKENS + ANSWER_TOKENS - used <= 30  # some time passed, 167 tokens a second
        assert left(server, "tokens", "b") == 10_000


def test_client_whose_tokens_are_used_up_has_to_wait(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings=with_limits(tokens_per_minute=30)) as server, server.client("a") as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        refused = client.post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        overdrawn = PROMPT_TOKENS + ANSWER_TOKENS - 30
        assert 0 < int(refused.headers["retry-after"]) <= 2 * (overdrawn + 1)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


@both_ways
def test_who_hangs_up_pays_for_what_was_generated(tmp_path: Path, stream: bool) -> None:
    with run_live_server(tmp_path, settings={"server": {"tokens_per_minute": 600}}) as server:
        server.engine.may_decode.clear()
        with asked(server, stream=stream, n=3):
            wait_until(is_decoding(server), what="every choice has its first token")
        wait_until(lambda: num_499(server) == 1, what="the request has ended")
        used = len("<|user|>math=0.9\n<|assistant|>") + 3
        assert 600 - used <= left(server, "tokens", key="x") <= 600 - used + 5


@pytest.mark.parametrize("phase", ["route", "load", "queue", "decode"])
@both_ways
def test_time_is_out_in_every_phase(tmp_path: Path, phase: str, stream: bool) -> None:
    with run_live_server(tmp_path, settings={"server": {"request_timeout_seconds": 0.5}}) as server:
        gates = {
            "route": server.engine.may_route,
            "load": server.may_load,
            "queue": server.engine.may_run,
            "decode": server.engine.may_decode,
        }
        gates[phase].clear()
        response = server.chat("math=0.9", stream=stream)
        gates[phase].set()
        if stream and phase not in ("route", "load"):  # the headers were out
            assert '"code":"request_timed_out"' in response.text.replace(" ", "")
            assert "[DONE]" not in response.text
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timed_out")
        assert_nothing_is_left(server)


def test_time_is_out_for_a_route_alone(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"request_timeout_seconds": 0.3}}) as server:
        server.engine.may_route.clear()
        with server.client() as client:
            response = client.post("/v1/route", json={"prompt": "math=0.9"})
        server.engine.may_route.set()
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timed_out")
        assert_nothing_is_left(server)


@pytest.mark.parametrize("path", ["/v1/chat/completions", f"/admin/blobs/{'0' * 64}"])
def test_body_that_does_not_come_is_not_waited_for(tmp_path: Path, path: str) -> None:
    settings: dict[str, dict[str, Any]] = {"server": {"request_timeout_seconds": 0.3, "admin_key": "k"}}
    method = "PUT" if "blobs" in path else "POST"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 100\r\n\r\n{{"
    with run_live_server(tmp_path, settings=settings) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=WAIT_SECONDS) as connection:
            connection.sendall(head.encode())
            answer = b""
            while piece := connection.recv(4096):  # until the server closes
                answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timed_out"' in answer


def test_upload_that_goes_on_may_take_longer_than_a_request(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"server": {"request_timeout_seconds": 0.4, "admin_key": "k"}}
    with run_live_server(tmp_path, settings=settings) as server, server.client("k") as client:
        never = threading.Event()

        def slowly() -> Iterator[bytes]:
            for _ in range(4):
                yield b"x"
                never.wait(0.15)

        response = client.put(f"/admin/blobs/{'0' * 64}", content=slowly())
    assert response.json()["error"]["code"] == "digest_mismatch"
