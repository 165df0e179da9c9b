"""The end of a server: not ready first, no new requests then, running ones finish or are told."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.disconnect import LAST_SENDS_SECONDS
from tests.integration.server.test_lifecycle import asked, assert_nothing_is_left, is_decoding, read_answer
from tests.servers import ANSWER, LiveServer, run_live_server, wait_until

both_ways = pytest.mark.parametrize("stream", [False, True])


@contextmanager
def server_with(folder: Path, **server: object) -> Iterator[LiveServer]:
    with run_live_server(folder, settings={"server": {"admin_key": "k", **server}}) as live:
        yield live


def leave(server: LiveServer) -> None:
    """What SIGTERM does."""
    server.http.should_exit = True


def ready(server: LiveServer) -> httpx.Response:
    with server.client() as client:
        return client.get("/health/ready")


def read_stream(connection: Any) -> tuple[int, list[dict[str, Any]], bool]:
    """Status, events and whether the stream was completed."""
    response = HTTPResponse(connection)
    response.begin()
    parts = [part.removeprefix("data: ") for part in response.read().decode().split("\n\n") if part]
    is_done = parts[-1:] == ["[DONE]"]
    return response.status, [json.loads(part) for part in parts if part != "[DONE]"], is_done


def test_readiness_ends_first_and_requests_are_still_answered_for_a_while(tmp_path: Path) -> None:
    with server_with(tmp_path, shutdown_delay_seconds=2) as server:
        assert ready(server).status_code == 200
        leave(server)
        wait_until(lambda: ready(server).status_code == 503, what="the server is not ready")
        assert ready(server).json()["status"] == "shutting down"
        answer = server.chat()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_new_requests_are_refused_while_running_ones_finish(tmp_path: Path) -> None:
    with server_with(tmp_path, drain_seconds=60) as server:
        server.engine.may_decode.clear()
        with asked(server) as whole, asked(server, stream=True) as streamed:
            wait_until(is_decoding(server), what="both decode")
            wait_until(lambda: server.service.admission.admitted == 2, what="both are admitted")
            leave(server)
            wait_until(lambda: ready(server).status_code == 503, what="the server is not ready")
            refused = server.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
            with server.client("k") as client:
                assert client.get("/admin/domains").status_code == 503
                assert client.get("/health/live").status_code == 200
                assert client.get("/metrics").status_code == 200
            assert ready(server).status_code == 503
            server.engine.may_decode.set()
            assert read_answer(whole)["choices"][0]["message"]["content"] == ANSWER
            status, events, is_done = read_stream(streamed)
            assert (status, is_done) == (200, True)
            assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == ANSWER
    assert_nothing_is_left(server)


@pytest.mark.parametrize("phase", ["route", "load", "queue", "decode"])
@both_ways
def test_requests_that_do_not_end_in_time_are_told(tmp_path: Path, phase: str, stream: bool) -> None:
    with server_with(tmp_path, drain_seconds=0.2) as server:
        gates = {
            "route": server.engine.may_route,
            "load": server.may_load,
            "queue": server.engine.may_run,
            "decode": server.engine.may_decode,
        }
        gates[phase].clear()
        with asked(server, stream=stream) as connection:
            arrived = {
                "route": lambda: server.service.admission.admitted == 1,
                "load": lambda: len(server.cache.snapshot().entries) == 2,
                "queue": lambda: len(server.engine.submitted) == 1,
                "decode": is_decoding(server),
            }
            wait_until(arrived[phase], what=f"the request is in {phase}")
            leave(server)
            if stream and phase in ("queue", "decode"):
                status, events, is_done = read_stream(connection)
                assert (status, events[-1]["error"]["code"], is_done) == (200, "shutting_down", False)
            else:
                response = HTTPResponse(connection)
                response.begin()
                assert (response.status, response.getheader("retry-after")) == (503, "5")
                assert json.loads(response.read())["error"]["code"] == "shutting_down"
            gates[phase].set()
    assert_nothing_is_left(server)
    assert server.metric("brainstacks_requests_total", endpoint="/v1/chat/completions", status="503") == 1


def test_server_without_requests_ends_at_once(tmp_path: Path) -> None:
    with server_with(tmp_path, drain_seconds=60) as server:
        server.chat()
        began = time.monotonic()
    assert time.monotonic() - began < LAST_SENDS_SECONDS


def test_loop_of_the_engine_that_ended_by_itself_ends_the_server(tmp_path: Path) -> None:
    with server_with(tmp_path, drain_seconds=60, shutdown_delay_seconds=60) as server:
        server.engine.heartbeat_age = float("inf")
        wait_until(lambda: server.http.engine_failed, what="the server has noticed")
        wait_until(lambda: not server.http.servers[0].is_serving(), what="the server has stopped listening")
