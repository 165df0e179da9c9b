"""The plans of a request's prompts, made side by side."""

import asyncio

import pytest

from server.generation import PromptPlan
from server.service import _all_or_none


@pytest.mark.parametrize("hangs_up", [False, True])
def test_no_plan_goes_on_when_one_has_failed_or_nobody_waits_any_more(hangs_up: bool) -> None:
    ended: list[str] = []

    async def wait() -> PromptPlan:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("waiting plan")
        raise AssertionError("never set")

    async def fail() -> PromptPlan:
        if hangs_up:
            return await wait()
        raise ValueError("unknown domain")

    async def plan() -> None:
        planning = asyncio.ensure_future(_all_or_none([wait(), fail()]))
        for _ in range(3):  # until both wait
            await asyncio.sleep(0)
        if hangs_up:
            planning.cancel()
        with pytest.raises(asyncio.CancelledError if hangs_up else ValueError):
            await planning
        assert len(ended) == 1 + hangs_up

    asyncio.run(plan())
