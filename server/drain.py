"""Ends requests in order at shutdown: no new ones, then the rest is told. Knows ASGI, not what is asked or when to end.

Health and metrics are answered until the process ends. Lives on the event loop, so needs no lock.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.boundary import PROBES, RequestRecord
from server.disconnect import send_last
from server.error_responses import event_of, response_to
from server.errors import ShuttingDown, answer_for


class Drain:
    """Where the server is between serving and ending, and which requests still run."""

    def __init__(self) -> None:
        self.is_leaving = False  # not ready any more
        self.is_closed = False  # new requests are refused
        self._running: set[asyncio.Timeout] = set()

    @property
    def num_running(self) -> int:
        """Requests that are not over."""
        return len(self._running)

    @contextmanager
    def running(self, timer: asyncio.Timeout) -> Iterator[None]:
        """A request that runs within the block, and which the timer ends."""
        self._running.add(timer)
        try:
            yield
        finally:
            self._running.discard(timer)

    def end_all(self) -> None:
        """Every request that still runs ends now, and its client is told. Once, as the last thing before the end."""
        now = asyncio.get_running_loop().time()
        for timer in self._running:
            timer.reschedule(now)


class DrainGate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        answer = _AnswerWatch(send, self._drain)
        try:
            async with asyncio.timeout(None) as timer:
                if self._drain.is_closed:
                    raise ShuttingDown("the server is shutting down")
                with self._drain.running(timer):
                    await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not timer.expired():
                raise
            late = ShuttingDown("the server is shutting down; it could not wait for the end of this answer")
            await _tell(late, answer, scope, receive)
        except ShuttingDown as refusal:
            await _tell(refusal, answer, scope, receive)


class _AnswerWatch:
    """Remembers how far an answer has come, and closes its connection if the server is leaving."""

    def __init__(self, send: Send, drain: Drain) -> None:
        self._send = send
        self._drain = drain
        self.is_started = self.is_complete = self.is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            self.is_event_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-")
            if self._drain.is_leaving:  # so that the client's next request finds another server
                MutableHeaders(scope=message)["connection"] = "close"
        elif not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)


async def _tell(error: ShuttingDown, answer: _AnswerWatch, scope: Scope, receive: Receive) -> None:
    """An error answer, or an error event where a stream has begun. ShuttingDown where neither is possible."""
    if answer.is_complete:
        return
    record = scope["brainstacks.record"]
    assert isinstance(record, RequestRecord)
    record.status = answer_for(error).status
    if answer.is_started and not answer.is_event_stream:
        raise error
    if answer.is_started:
        await send_last(answer.send({"type": "http.response.body", "body": event_of(error), "more_body": False}))
    else:
        await send_last(response_to(error)(scope, receive, answer.send))
