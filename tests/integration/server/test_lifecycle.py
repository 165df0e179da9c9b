"""However a request ends, in whatever phase: nothing of it stays in queue, engine or cache."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Message

from engine.errors import EngineFailed, EngineStopped
from server.boundary import RequestRecord
from server.catalog import LeasedMix
from server.generation import Generation
from server.jobs import read_chat_job
from server.schemas import ChatCompletionRequest
from server.shapes import ChatShape
from server.streams import AnswerStream
from tests.servers import WAIT_SECONDS, LiveServer, run_live_server, wait_until

both_ways = pytest.mark.parametrize("stream", [False, True])


@contextmanager
def asked(
    server: LiveServer, text: str = "math=0.9", *, request_id: str = "", **fields: Any
) -> Iterator[socket.socket]:
    """A client that asks and then waits; it hangs up at the end of the block."""
    with ask_at(server.url, text, request_id=request_id, **fields) as connection:
        yield connection


@contextmanager
def ask_at(url: str, text: str, *, request_id: str = "", **fields: Any) -> Iterator[socket.socket]:
    """As `asked`, of a server that is known by its address."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()
    head = f"x-request-id: {request_id}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + head.encode() + body)
        yield connection


def read_answer(connection: socket.socket) -> dict[str, Any]:
    """The whole answer, which must be a good one."""
    response = HTTPResponse(connection)
    response.begin()
    body: dict[str, Any] = json.loads(response.read())
    assert response.status == 200, body
    return body


def num_499(server: LiveServer) -> float:
    """Requests whose client had gone."""
    labels = {"endpoint": "/v1/chat/completions", "status": "499"}
    return server.service.metrics.registry.get_sample_value("brainstacks_requests_total", labels) or 0


def assert_nothing_is_left(server: LiveServer) -> None:
    """The house is empty, and the cache's books add up."""
    wait_until(lambda: server.service.admission.admitted == 0, what="no sequence is admitted")
    wait_until(lambda: server.engine.snapshot().running == 0, what="no sequence runs")
    wait_until(lambda: server.cache.snapshot().leased_bytes == 0, what="no byte is leased")
    assert server.cache.snapshot().waiting == 0
    server.cache.check_integrity()


def is_decoding(server: LiveServer) -> Callable[[], bool]:
    """Whether the first token of every submitted sequence is out."""
    return lambda: bool(server.engine.submitted) and server.engine.num_sent() == len(server.engine.submitted)


@both_ways
def test_client_who_hangs_up_while_the_text_is_read_is_never_routed(
    server: LiveServer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text is tokenized in a thread; its sequence is admitted before."""
    may_read, encode = threading.Event(), server.service.reader._encode

    def read_slowly(text: str, add_special_tokens: bool) -> tuple[int, ...]:
        may_read.wait(WAIT_SECONDS)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(server.service.reader, "_encode", read_slowly)
    with asked(server, "math=0.9 " * 1000, stream=stream):
        wait_until(lambda: server.service.admission.admitted == 1, what="the request is admitted")
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    may_read.set()
    assert_nothing_is_left(server)
    assert server.router.texts == []


@both_ways
def test_client_who_hangs_up_during_the_route_generates_nothing(server: LiveServer, stream: bool) -> None:
    server.engine.may_route.clear()
    with asked(server, stream=stream):
        wait_until(lambda: server.service.admission.admitted == 1, what="the request is admitted")
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    server.engine.may_route.set()
    assert_nothing_is_left(server)
    assert server.engine.submitted == []


@both_ways
def test_client_who_hangs_up_during_a_load_holds_no_lease(server: LiveServer, stream: bool) -> None:
    server.may_load.clear()
    with asked(server, stream=stream):
        wait_until(lambda: len(server.cache.snapshot().entries) == 2, what="the domains load")
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    server.may_load.set()
    assert_nothing_is_left(server)
    assert server.engine.submitted == []
    assert server.chat("math=0.9").json()["brainstacks"]["mix"] == {"chat": 0.2, "math": 0.9}


@both_ways
def test_client_who_hangs_up_while_waiting_for_room_leaves_the_line(tmp_path: Path, stream: bool) -> None:
    with run_live_server(tmp_path, budget_domains=1) as server:
        server.engine.may_decode.clear()
        with asked(server, model="tiny:math"):
            wait_until(is_decoding(server), what="math is held")
            with asked(server, model="tiny:code", stream=stream):
                wait_until(lambda: server.cache.snapshot().waiting == 1, what="code waits for room")
            wait_until(lambda: server.cache.snapshot().waiting == 0, what="nobody waits")
        assert_nothing_is_left(server)
        assert len(server.engine.submitted) == 1


@both_ways
@pytest.mark.parametrize("n", [1, 3])
def test_client_who_hangs_up_before_prefill_is_cancelled(server: LiveServer, stream: bool, n: int) -> None:
    server.engine.may_run.clear()
    with asked(server, stream=stream, n=n):
        wait_until(lambda: len(server.engine.submitted) == n, what="the engine has the request")
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    assert sorted(server.engine.cancelled) == sorted(r.request_id for r in server.engine.submitted)
    assert_nothing_is_left(server)


@both_ways
@pytest.mark.parametrize("n", [1, 3])
def test_client_who_hangs_up_during_decode_is_cancelled(server: LiveServer, stream: bool, n: int) -> None:
    server.engine.may_decode.clear()
    with asked(server, stream=stream, n=n):
        wait_until(is_decoding(server), what="every choice has its first token")
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    assert len(server.engine.cancelled) == n
    assert_nothing_is_left(server)


@both_ways
@pytest.mark.parametrize("error", [EngineFailed("a step failed"), EngineStopped("the engine is shutting down")])
def test_failure_of_the_engine_frees_everything(server: LiveServer, stream: bool, error: Exception) -> None:
    server.engine.fail_with = error
    server.chat("math=0.9", stream=stream, n=2)
    assert_nothing_is_left(server)


@both_ways
def test_refusal_by_the_engine_frees_everything(server: LiveServer, stream: bool) -> None:
    server.engine.refuse_with = EngineStopped("the engine is shutting down")
    response = server.chat("math=0.9", stream=stream, n=2)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert_nothing_is_left(server)


@both_ways
def test_answered_request_frees_everything(server: LiveServer, stream: bool) -> None:
    assert server.chat("math=0.9", stream=stream, n=2).status_code == 200
    assert_nothing_is_left(server)
    assert server.engine.cancelled == []


def test_requests_with_one_client_id_are_not_mistaken_for_each_other(server: LiveServer) -> None:
    server.engine.may_decode.clear()
    with asked(server, request_id="same") as stays:
        with asked(server, request_id="same"):
            wait_until(lambda: server.engine.num_sent() == 2, what="both have their first token")
        wait_until(lambda: num_499(server) == 1, what="one has ended")
        server.engine.may_decode.set()
        assert read_answer(stays)["choices"][0]["finish_reason"] == "stop"
    assert_nothing_is_left(server)


def test_load_in_progress_does_not_hold_up_other_requests(server: LiveServer) -> None:
    assert server.chat(model="tiny:math").status_code == 200
    server.may_load.clear()
    with asked(server, model="tiny:code"):
        wait_until(lambda: len(server.cache.snapshot().entries) == 2, what="code loads")
        assert server.chat(model="tiny:math").status_code == 200
        assert server.chat(model="tiny:base").status_code == 200
        server.may_load.set()
        wait_until(lambda: len(server.engine.submitted) == 4, what="code is answered too")
    assert_nothing_is_left(server)


async def begin(server: LiveServer, text: str = "math=0.9") -> Generation:
    """A generation without HTTP around it."""
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": text}]})
    choice = server.service.choose(None, None)
    return await server.service.begin(1, partial(read_chat_job, server.service, request, choice))


def test_finished_prompt_lets_go_of_its_domains_while_its_answer_is_still_told(server: LiveServer) -> None:
    async def generate() -> LeasedMix:
        generation = await begin(server)
        async for _ in generation.events():
            pass
        generation.close()
        return generation.runs[0].leased

    told = asyncio.run(generate())
    assert (told.domains, told.lease) == ((), None)
    assert (told.weights, sorted(told.cold)) == ({"chat": 0.2, "math": 0.9}, ["chat", "math"])


def test_client_who_has_stopped_reading_keeps_nothing_after_its_time(server: LiveServer) -> None:
    server.engine.may_decode.clear()
    scope: dict[str, Any] = {"type": "http"}

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("never comes here")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def stream() -> None:
        generation = await begin(server)
        answer = AnswerStream(
            generation,
            ChatShape(model="tiny", wants_logprobs=False, text=server.service.token_text),
            record=RequestRecord("id"),
            wants_usage=False,
            deadline=asyncio.get_running_loop().time() + 0.05,
            headers={},
            last_sends_seconds=0.05,
        )
        await asyncio.wait_for(answer(scope, receive, send), WAIT_SECONDS)
        with pytest.raises(EngineStopped):  # what a cancelled sequence ends with
            async for _ in generation.events():
                pass

    asyncio.run(stream())
    assert_nothing_is_left(server)
