"""uvicorn's HTTP/1.1 on httptools, with bounds that it lacks. Knows bytes of a connection, no app.

The head of a request may have 64 KiB, where httptools takes any number of headers of any length. And one request is
answered at a time: uvicorn stops to read while a second one waits, so that nobody would notice that the client of the
first has hung up. What comes before an answer is complete is not read, and the connection closes behind that answer,
so that the client asks again on another one, as RFC 9112 (9.3.2) has it.
"""

import logging
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.error_responses import error_body

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536  # more only where it comes, with its end, in one piece


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_in_head = True
        self._head_bytes = 0
        self._is_refusing = False

    def data_received(self, data: bytes) -> None:
        """May be any part of requests."""
        if self._is_answering and not self.cycle.more_body:
            self._refuse_another(data)
            return
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._is_in_head = False
        self._is_refusing = self._is_answering
        if self._is_refusing:
            self.cycle.keep_alive = False
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if not self._is_refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._is_refusing:
            super().on_message_complete()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_another(self, data: bytes) -> None:
        if data.strip():  # some clients end a body with a line break that does not belong to it
            self.cycle.keep_alive = False

    def _refuse_head(self) -> None:
        logger.warning("request refused status=431 bytes=%d", self._head_bytes)
        message = f"the request line and headers have more than {MAX_HEAD_BYTES} bytes"
        body = orjson.dumps(error_body(message, status=431, code="headers_too_large"))
        lines = (
            "HTTP/1.1 431 Request Header Fields Too Large",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
