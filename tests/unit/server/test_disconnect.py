"""Work for a client ends with the client, its time, or itself."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest
from starlette.types import Message

from server.catalog import claim_lease
from server.disconnect import run_for_client
from server.errors import ClientGone, RequestTimedOut

T = TypeVar("T")


async def stays() -> Message:
    """A client that waits for its answer."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


async def has_gone() -> Message:
    return {"type": "http.disconnect"}


class Work:
    """Goes on until it is cancelled; its clean-up takes a while."""

    def __init__(self) -> None:
        self.is_cleaned_up = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.is_cleaned_up = True


async def give(value: T) -> T:
    return value


def run(receive: Callable[[], Awaitable[Message]], work: Coroutine[Any, Any, T], seconds: float = 60.0) -> T:
    async def within_loop() -> T:
        return await run_for_client(receive, work, deadline=asyncio.get_running_loop().time() + seconds)

    return asyncio.run(within_loop())


def test_finished_work_is_delivered() -> None:
    assert run(stays, give(7)) == 7


def test_work_ends_and_is_cleaned_up_when_the_client_goes() -> None:
    work = Work()
    with pytest.raises(ClientGone):
        run(has_gone, work.run())
    assert work.is_cleaned_up


def test_work_ends_and_is_cleaned_up_when_time_is_out() -> None:
    work = Work()
    with pytest.raises(RequestTimedOut):
        run(stays, work.run(), seconds=0.01)
    assert work.is_cleaned_up


def test_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(stays, fail())


def test_lease_granted_in_the_instant_of_cancelling_is_released() -> None:
    class Lease:
        released = 0

        def release(self) -> None:
            Lease.released += 1

    async def cancel_when_granted(grant_first: bool) -> None:
        future: Any = Future()
        task = asyncio.create_task(claim_lease(future, timeout_seconds=60))
        await asyncio.sleep(0)
        if grant_first:
            future.set_result(Lease())
            task.cancel()
        else:
            task.cancel()
            future.set_result(Lease())
        with pytest.raises(asyncio.CancelledError):
            await task

    for grant_first in (True, False):
        asyncio.run(cancel_when_granted(grant_first))
    assert Lease.released == 2
