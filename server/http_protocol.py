"""uvicorn's HTTP/1.1 on httptools, with bounds that it lacks. Knows bytes of a connection, no app.

What comes beside a body (the head of a request, the framing of chunks, trailers) may have 64 KiB, where httptools takes
any number of headers of any length. And one request is answered at a time: uvicorn stops to read while a second one
waits, so that nobody would notice that the client of the first has hung up. What comes before an answer is complete is
not read, and the connection closes behind that answer, so that the client asks again on another one, as RFC 9112
(9.3.2) has it. An upgrade is never taken, as RFC 9110 (7.8) allows: Java's client asks for h2c with every request, and
the parser would take the body for the other protocol's.
"""

import logging
from typing import Any, Literal

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.error_responses import CODES_BY_STATUS, error_body

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536  # more only where it comes, with its end, in one piece, or begins behind another request's end

Part = Literal["head", "behind the head", "refused", "upgrade"]
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._part: Part = "head"
        self._bytes_beside_body = 0
        self._has_moved = False  # into, within or out of a body, in the piece that is parsed

    def data_received(self, data: bytes) -> None:
        """May be any part of requests."""
        if self._is_answering and not self.cycle.more_body:
            self._refuse_another(data)
            return
        self._has_moved = False
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            logger.warning("request refused status=400 reason='no HTTP'")
            self.send_400_response("Invalid HTTP request received.")
        self._bytes_beside_body = 0 if self._has_moved else self._bytes_beside_body + len(data)
        if self.transport.is_closing():
            return
        if self._bytes_beside_body > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not self._is_answering:
            self._wait_for_more()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._part, self._bytes_beside_body = "head", 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for trailers, of which none is known here."""
        if self._part == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._has_moved = True
        if self._is_answering:
            self._part = "refused"
            self.cycle.keep_alive = False
        elif self.parser.should_upgrade():
            self._part = "upgrade"
        else:
            self._part = "behind the head"
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._has_moved = True
        if self._part == "behind the head":
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._has_moved = True
        if self._part == "behind the head":
            super().on_message_complete()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            (offset,) = upgrade.args
            if self._part == "upgrade":
                self._read_without_upgrade(data[offset:])

    def _read_without_upgrade(self, rest: bytes) -> None:
        """The same request again, as it would be without asking for another protocol."""
        method = self.parser.get_method()
        if method == b"CONNECT":  # which is nothing but an upgrade
            raise httptools.HttpParserInvalidMethodError(f"{method!r} is not served")
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(one for one in value.split(b",") if one.strip().lower() not in UPGRADE_HEADERS)
            if name not in UPGRADE_HEADERS:
                head.append(b"%b: %b\r\n" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join(head) + b"\r\n" + rest)

    def _refuse_another(self, data: bytes) -> None:
        # Some clients end a body with a line break that does not belong to it; within a head, it belongs to that.
        if self._part == "head" or data.strip():
            self.cycle.keep_alive = False

    def _wait_for_more(self) -> None:
        """As long as for a request: every piece of one ends the wait that uvicorn began."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse_head(self) -> None:
        if self._part != "head":  # trailers or the framing of chunks: this request has its answer, or gets none
            logger.warning("connection closed reason='no body' bytes=%d", self._bytes_beside_body)
            self.transport.close()
            return
        logger.warning("request refused status=431 bytes=%d", self._bytes_beside_body)
        message = f"the request line and headers have more than {MAX_HEAD_BYTES} bytes"
        body = orjson.dumps(error_body(message, status=431, code=CODES_BY_STATUS[431]))
        lines = (
            "HTTP/1.1 431 Request Header Fields Too Large",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
