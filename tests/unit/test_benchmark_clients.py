"""The clients and watchers of the benchmarks see what they are there to see."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from random import Random

import pytest

from tests.benchmarks.event_streams import Connection
from tests.benchmarks.load_answers import Case
from tests.benchmarks.load_clients import Clients, Plan
from tests.benchmarks.process_watch import Held, thirds
from tests.benchmarks.stream_clients import StreamClients

CASE = Case({}, text="one two", finish_reason="length", prompt_tokens=1, completion_tokens=2, mix={})


@contextmanager
def answering(content: bytes) -> Iterator[int]:
    """The port of something that answers one request so, and does not hang up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def answer() -> None:
            taken.append(listener.accept()[0])
            taken[0].recv(65536)
            taken[0].sendall(content)

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()
        taken[0].close()


def stream_of(text: str) -> bytes:
    choice = {"delta": {"content": text}, "finish_reason": None}
    event = f"data: {json.dumps({'id': 'a', 'choices': [choice]})}\n\n".encode()
    return b"HTTP/1.1 200 OK\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (stream_of("one"), None),
        (stream_of("one two three"), None),
        (stream_of("one tow"), "left with 'one tow' for 'one two'"),
        (b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}", "500: {}"),
    ],
)
def test_stream_that_is_left_has_to_be_right_so_far(content: bytes, words: str | None) -> None:
    async def leave(port: int) -> list[str]:
        clients = Clients(Plan(port, "tiny", num_clients=1, seconds=0.0, seed=0, cases=[CASE]))
        await clients._hang_up(Connection(port), "in the stream", Random(0))
        assert clients.tally.hung_up == {"in the stream": 1}
        return clients.tally.failures

    with answering(content) as port:
        failures = asyncio.run(leave(port))
    assert len(failures) == (words is not None)
    assert words is None or words in failures[0]


def test_refusal_is_no_stream_to_wait_for() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}"
    with (
        answering(refusal) as port,
        closing(StreamClients(port)) as clients,
        pytest.raises(ConnectionError, match="429 Too Many Requests"),
    ):
        clients.stream([{}])


def test_silent_stream_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.stream_clients.SILENT_SECONDS", 0.05)
    with (
        answering(b"HTTP/1.1 200 OK\r\n\r\n") as port,
        closing(StreamClients(port)) as clients,
        pytest.raises(TimeoutError, match="1 streams"),
    ):
        clients.stream([{}])


@pytest.mark.parametrize("count", range(3, 9))
def test_thirds_have_all_samples_and_none_is_empty(count: int) -> None:
    held = [Held(number, 0, 0) for number in range(count)]
    parts = thirds(held)
    assert [one for part in parts for one in part] == held
    lengths = [len(part) for part in parts]
    assert len(lengths) == 3
    assert max(lengths) - min(lengths) <= 1


def test_two_samples_have_no_thirds() -> None:
    with pytest.raises(ValueError, match="2 samples"):
        thirds([Held(1, 0, 0)] * 2)
