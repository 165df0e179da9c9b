"""Streams answers over raw sockets, all at once, in a process of its own. Knows HTTP/1.1 and clocks, nothing of chats.

It takes as little of the processor as it can, because it shares the cores with the server that it measures: bytes are
kept as they come and read when the last stream has ended. One line of JSON in, one line out, as often as wanted.
"""

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

CONTENT = re.compile(rb'"content":"[^"]')
END_OF_BODY = b"0\r\n\r\n"  # the last chunk; an event ends otherwise
PIECE_BYTES = 65536
SILENT_SECONDS = 60.0  # of all streams together, after which the server is given up


@dataclass(frozen=True, slots=True)
class Streamed:
    """What became of requests that were sent together. Seconds count from the moment before the first was sent."""

    seconds: float  # to the end of the last stream
    first_content_seconds: list[float]  # one a stream
    completion_tokens: int
    cpu_seconds: float  # of this process


@dataclass(slots=True)
class _Stream:
    connection: socket.socket
    sent_at: float = 0.0
    first_content_at: float | None = None
    pieces: list[bytes] = field(default_factory=list)

    def take(self) -> bool:
        """Reads what is there; whether it was the last."""
        piece = self.connection.recv(PIECE_BYTES)
        if not piece:
            raise ConnectionError(f"the server hung up after {b''.join(self.pieces)[-200:]!r}")
        if not self.pieces and not piece.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"not a stream: {piece[:300]!r}")
        if self.first_content_at is None and CONTENT.search(piece):
            self.first_content_at = time.perf_counter()
        self.pieces.append(piece)
        return piece.endswith(END_OF_BODY)

    def completion_tokens(self) -> int:
        """As the stream's last chunk counts them."""
        whole = b"".join(self.pieces)
        counts = re.findall(rb'"completion_tokens":(\d+)', whole)
        if not counts:
            raise ConnectionError(f"not a whole stream: {whole[:300]!r}")
        return int(counts[-1])


class StreamClients:
    """Connections that stay open, one a body."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[socket.socket] = []

    def stream(self, bodies: Sequence[dict[str, Any]]) -> Streamed:
        """Sends all requests and reads all streams to their ends."""
        while len(self._connections) < len(bodies):
            connection = socket.create_connection(("127.0.0.1", self._port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
        requests = [_request(body) for body in bodies]
        streams = [_Stream(connection) for connection in self._connections[: len(bodies)]]
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream.connection, selectors.EVENT_READ, stream)
            cpu, began = time.process_time(), time.perf_counter()
            for stream, request in zip(streams, requests, strict=True):
                stream.sent_at = time.perf_counter()
                stream.connection.sendall(request)
            unfinished = len(streams)
            while unfinished:
                if not (ready := selector.select(SILENT_SECONDS)):
                    raise TimeoutError(f"{unfinished} streams have been silent for {SILENT_SECONDS} seconds")
                for key, _ in ready:
                    if key.data.take():
                        selector.unregister(key.fileobj)
                        unfinished -= 1
            ended = time.perf_counter()
            cpu = time.process_time() - cpu
        firsts = [(stream.first_content_at or ended) - stream.sent_at for stream in streams]
        return Streamed(ended - began, firsts, sum(stream.completion_tokens() for stream in streams), cpu)

    def close(self) -> None:
        """Hangs up."""
        for connection in self._connections:
            connection.close()


class ClientProcess:
    """StreamClients in another process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def stream(self, bodies: Sequence[dict[str, Any]]) -> Streamed:
        """As StreamClients does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(bodies) + "\n")
        self._process.stdin.flush()
        return Streamed(**json.loads(self._process.stdout.readline()))


@contextmanager
def client_process(port: int) -> Iterator[ClientProcess]:
    """Runs while the block does."""
    command = [sys.executable, "-m", "tests.benchmarks.stream_clients", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield ClientProcess(process)
        process.communicate()  # closes its input, which ends it


def main() -> None:
    """Serves its standard input."""
    with closing(StreamClients(int(sys.argv[1]))) as clients:
        for line in sys.stdin:
            print(json.dumps(asdict(clients.stream(json.loads(line)))), flush=True)


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


if __name__ == "__main__":
    main()
