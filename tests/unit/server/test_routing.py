"""Routes are remembered, and a swapped router is never mistaken for the old one."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from server.routing import MAX_CHARACTERS_PER_TOKEN, Routing
from tests.servers import ScriptedRouter


class HeldDevice:
    """Gives work to the test instead of running it."""

    def __init__(self) -> None:
        self.held: list[tuple[Callable[[], Any], Future[Any]]] = []

    def run_on_device(self, work: Callable[[], Any], /) -> Future[Any]:
        future: Future[Any] = Future()
        self.held.append((work, future))
        return future

    def run_held(self) -> None:
        for work, future in self.held:
            future.set_result(work())
        self.held.clear()


def load_nothing(path: Path) -> ScriptedRouter:
    raise AssertionError("no file is loaded here")


def test_route_made_by_a_router_that_was_swapped_meanwhile_is_not_remembered() -> None:
    async def swap_during_a_route() -> None:
        device: Any = HeldDevice()
        old, new = ScriptedRouter(("math",)), ScriptedRouter(("law",))
        routing = Routing(device.run_on_device, load_router=load_nothing, router=old)
        first = asyncio.create_task(routing.route("law=0.9"))
        await asyncio.sleep(0)
        routing.swap(new)
        device.run_held()
        assert set((await first).scores) == {"math"}
        second = asyncio.create_task(routing.route("law=0.9"))
        await asyncio.sleep(0)
        device.run_held()
        assert set((await second).scores) == {"law"}

    asyncio.run(swap_during_a_route())


def test_router_is_given_no_more_of_a_long_text_than_it_could_read() -> None:
    async def route_long_text() -> None:
        device: Any = HeldDevice()
        router = ScriptedRouter(("math",))
        routing = Routing(device.run_on_device, load_router=load_nothing, router=router)
        route = asyncio.create_task(routing.route("math=0.9 " + "word " * 100_000))
        await asyncio.sleep(0)
        device.run_held()
        assert (await route).scores == {"math": 0.9}
        assert [len(text) for text in router.texts] == [router.max_tokens * MAX_CHARACTERS_PER_TOKEN]

    asyncio.run(route_long_text())


def test_a_gap_is_told_once_while_its_route_is_remembered() -> None:
    async def ask() -> None:
        device: Any = HeldDevice()
        routing = Routing(device.run_on_device, load_router=load_nothing, router=ScriptedRouter(("math",)))
        assert routing.first_gap("unheard of") == "unheard of"  # never routed, so nothing is remembered
        task = asyncio.create_task(routing.route("unheard of"))
        await asyncio.sleep(0)
        device.run_held()
        assert (await task).gap
        assert [routing.first_gap("unheard of") for _ in range(3)] == ["unheard of", None, None]
        routing.swap(ScriptedRouter(("law",)))
        assert routing.first_gap("unheard of") == "unheard of"
        as_far_as_it_reads = ScriptedRouter.max_tokens * MAX_CHARACTERS_PER_TOKEN
        assert routing.first_gap("unheard of " * 100) == ("unheard of " * 100)[:as_far_as_it_reads]

    asyncio.run(ask())
