"""What a connection may carry: bounded heads, one request at a time, whole bodies."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.server.test_lifecycle import num_499
from tests.servers import WAIT_SECONDS, LiveServer, run_live_server, wait_until

CHAT = {"messages": [{"role": "user", "content": "math=0.9"}]}


@contextmanager
def connected(server: LiveServer) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=WAIT_SECONDS) as connection:
        yield connection


def request_of(path: str, body: object = None, *, length: int | None = None) -> bytes:
    """One whole request, unless it says a greater length."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: x\r\n"
    head += f"content-type: application/json\r\ncontent-length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


def answer_of(connection: socket.socket) -> HTTPResponse:
    response = HTTPResponse(connection)
    response.begin()
    return response


def test_a_head_without_end_is_refused(server: LiveServer) -> None:
    """As one header or as many, on a connection that was used before."""
    for piece in (b"x" * 10_000, b"x: " + b"y" * 9_995 + b"\r\n"):
        with connected(server) as connection:
            connection.sendall(request_of("/health/live"))
            first = answer_of(connection)
            assert (first.status, first.read() != b"") == (200, True)
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-filler: ")
            for _ in range(7):
                connection.sendall(piece)
            refusal = answer_of(connection)
            assert refusal.status == 431
            assert json.loads(refusal.read())["error"]["code"] == "headers_too_large"
            assert connection.recv(1) == b""


def test_what_is_no_http_is_refused_in_plain_text_without_an_id(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(b"hello\r\n\r\n")
        refusal = answer_of(connection)
        assert (refusal.status, refusal.getheader("x-request-id")) == (400, None)
        assert (refusal.getheader("content-type") or "").startswith("text/plain")


@pytest.mark.parametrize("pieces", ["one", "two", "bytes"])
def test_an_upgrade_is_not_taken_and_the_body_is_read(server: LiveServer, pieces: str) -> None:
    """As Java's client asks."""
    head, content = request_of("/v1/chat/completions", CHAT).split(b"\r\n\r\n", 1)
    head += (
        b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n\r\n"
    )
    whole = head + content
    parts = {"one": [whole], "two": [head, content], "bytes": [bytes([byte]) for byte in whole]}[pieces]
    with connected(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):  # the connection serves on
            for part in parts:
                connection.sendall(part)
            answer = answer_of(connection)
            assert (answer.status, json.loads(answer.read())["object"]) == (200, "chat.completion")


@pytest.mark.parametrize("head", ["GET /health/live", "GET /v1/models"])
def test_a_websocket_is_answered_as_a_plain_request(server: LiveServer, head: str) -> None:
    with connected(server) as connection:
        upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13"
        connection.sendall(f"{head} HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n\r\n".encode())
        assert answer_of(connection).status == 200


def test_a_tunnel_is_refused(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n")
        assert answer_of(connection).status == 400
        assert connection.recv(1) == b""


def test_an_upgrade_behind_another_request_closes_the_connection_behind_that(server: LiveServer) -> None:
    server.engine.may_decode.clear()
    upgrade = b"GET /health/live HTTP/1.1\r\nhost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(request_of("/v1/chat/completions", CHAT) + upgrade)
        wait_until(lambda: server.engine.num_sent() == 1, what="the first request decodes")
        server.engine.may_decode.set()
        answer = answer_of(connection)
        assert (answer.status, json.loads(answer.read())["object"]) == (200, "chat.completion")
        assert connection.recv(1) == b""


def test_a_long_head_and_a_longer_body_are_read(server: LiveServer) -> None:
    body = CHAT | {"user": "x" * 200_000}
    with connected(server) as connection:
        head, content = request_of("/v1/chat/completions", body).split(b"\r\n\r\n", 1)
        connection.sendall(head + b"\r\nx-filler: " + b"y" * 50_000 + b"\r\n\r\n" + content)
        assert answer_of(connection).status == 200


def test_who_hangs_up_behind_a_second_request_is_noticed(server: LiveServer) -> None:
    for together in (True, False):
        before = num_499(server)
        server.engine.may_decode.clear()
        first, second = request_of("/v1/chat/completions", CHAT), request_of("/health/live")
        with connected(server) as connection:
            connection.sendall(first + second if together else first)
            wait_until(lambda: server.engine.num_sent() == 1, what="the first request decodes")
            if not together:
                connection.sendall(second)
        wait_until(lambda: num_499(server) == before + 1, what="the first request has ended")  # noqa: B023
        server.engine.may_decode.set()


def test_a_second_request_before_the_answer_closes_the_connection_behind_it(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(request_of("/v1/chat/completions", CHAT) + request_of("/health/live"))
        answer = answer_of(connection)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert json.loads(answer.read())["object"] == "chat.completion"
        assert connection.recv(1) == b""


def test_who_hangs_up_before_the_end_of_the_body_is_counted_as_gone(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(request_of("/v1/chat/completions", CHAT, length=10_000))
    wait_until(lambda: num_499(server) == 1, what="the request has ended")
    assert server.engine.submitted == []


def test_trailers_without_end_close_the_connection_and_are_not_kept(server: LiveServer) -> None:
    """Behind an answer that did not wait for the body."""
    head = b"PUT /admin/domains/math HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(head + b"1\r\nx\r\n0\r\n")
        assert answer_of(connection).status == 401
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x: " + b"y" * 9_995 + b"\r\n")
            pytest.fail("ten megabytes of trailers were taken")


def test_a_body_in_many_small_chunks_is_read(server: LiveServer) -> None:
    """Their framing is longer than a head may be."""
    content = json.dumps(CHAT | {"user": "x" * 30_000}).encode()
    chunks = [b"1;an-extension\r\n" + content[i : i + 1] + b"\r\n" for i in range(len(content))]
    with connected(server) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n")
        connection.sendall(b"content-type: application/json\r\n\r\n")
        connection.sendall(b"".join(chunks) + b"0\r\nx-trailer: unread\r\n\r\n")
        assert answer_of(connection).status == 200


def test_a_long_body_and_the_next_head_in_one_piece_leave_the_answer_whole(server: LiveServer) -> None:
    server.engine.may_decode.clear()
    first = request_of("/v1/chat/completions", CHAT | {"user": "x" * 70_000})
    with connected(server) as connection:
        connection.sendall(first + b"GET /health/live HTTP/1.1\r\nhost: x\r\n")
        wait_until(lambda: server.engine.num_sent() == 1, what="the first request decodes")
        connection.sendall(b"\r\n")  # the end of the second head
        server.engine.may_decode.set()
        answer = answer_of(connection)
        assert (answer.status, json.loads(answer.read())["object"]) == (200, "chat.completion")
        assert connection.recv(1) == b""


def test_who_falls_silent_within_a_request_is_not_waited_for(tmp_path: Path) -> None:
    """Neither behind an answer that did not wait for the body, nor within a head."""
    refused = b"PUT /admin/domains/math HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nxx"
    settings = {"server": {"admin_key": "key", "keep_alive_seconds": 1}}
    with run_live_server(tmp_path, settings=settings) as server:
        with connected(server) as connection:
            connection.sendall(refused)
            assert answer_of(connection).status == 401
            connection.sendall(b"x")
            assert connection.recv(1) == b""
        with connected(server) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: ")
            assert connection.recv(1) == b""
