"""Speaks HTTP/1.1 over asyncio's sockets and reads event streams. Knows bytes and events, not what they mean.

Cheaper than a client library, and it can hang up at any byte, half of a request included.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"


class CutOff(Exception):
    """The server closed the connection in the middle of an answer; the message has how far that came."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers; names in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def is_event_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


class Connection:
    """To one server; one request after the other. Opened when it is needed, and again once it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, content: bytes, *, share: float = 1.0) -> None:
        """Posts a chat, or only that share of its bytes. ConnectionError if nobody listens."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        whole = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
        self._writer.write(whole[: int(share * len(whole))])
        await self._writer.drain()

    async def head(self) -> Head:
        """Of the answer. CutOff if there is none."""
        lines = (await self._until(b"\r\n\r\n", "before the headers")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        return Head(int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields})

    async def body(self, head: Head) -> Any:
        """JSON of a known length."""
        assert self._reader is not None
        try:
            content = await self._reader.readexactly(int(head.headers["content-length"]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise CutOff("in the body") from error
        self._end(head)
        return json.loads(content)

    async def events(self, head: Head) -> AsyncIterator[str]:
        """What follows each `data: `, until the stream's proper end. CutOff without one."""
        rest, count = b"", 0
        while chunk := await self._chunk(count):
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                count += 1
                yield event.removeprefix(b"data: ").decode()
        if rest:
            raise CutOff(f"in the middle of event {count}")
        self._end(head)

    def hang_up(self, *, rudely: bool = False) -> None:
        """Closes the connection, or resets it."""
        if self._writer is not None:
            self._writer.transport.abort() if rudely else self._writer.close()
        self._reader = self._writer = None

    async def _chunk(self, num_events: int) -> bytes:
        where = f"after {num_events} events"
        assert self._reader is not None
        num_bytes = int(await self._until(b"\r\n", where), 16)
        try:
            return (await self._reader.readexactly(num_bytes + 2))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise CutOff(where) from error

    async def _until(self, end: bytes, where: str) -> bytes:
        assert self._reader is not None
        try:
            return await self._reader.readuntil(end)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise CutOff(where) from error

    def _end(self, head: Head) -> None:
        if head.headers.get("connection") == "close":
            self.hang_up()
