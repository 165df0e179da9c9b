"""Runs work for a client only as long as the client is there and within its time. Knows ASGI messages, not the work."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ClientGone, RequestTimedOut

logger = logging.getLogger(__name__)

LAST_SENDS_SECONDS = 5.0  # a client that has stopped reading would keep its task for ever

T = TypeVar("T")


async def run_for_client(receive: Receive, work: Coroutine[Any, Any, T], *, deadline: float | None = None) -> T:
    """The work's result. Cancels the work, and waits for its clean-up, when the client hangs up or time is out.

    `deadline` is in the event loop's own clock. Raises ClientGone or RequestTimedOut.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    watcher = loop.create_task(_disconnected(receive))
    left_seconds = None if deadline is None else max(0.0, deadline - loop.time())
    try:
        done, _ = await asyncio.wait({task, watcher}, timeout=left_seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:  # finished work is delivered, whatever else happened in the same instant
            return task.result()
        if watcher in done:
            raise ClientGone("the client hung up")
        raise RequestTimedOut("the request took longer than this server allows")
    finally:
        for part in (task, watcher):
            part.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def send_last(sending: Awaitable[None], *, within_seconds: float = LAST_SENDS_SECONDS) -> None:
    """The end of an answer, unless the client has stopped reading."""
    try:
        async with asyncio.timeout(within_seconds):
            await sending
    except TimeoutError:
        logger.warning("end of answer not sent reason='the client does not read'")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
