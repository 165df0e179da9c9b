"""Whatever is asked of a cache, in whatever order: the budget holds, what is leased stays, and everybody is answered.

A state machine asks, loads, fails, releases, cancels, pins, retires and lets time pass at random; a second copy of the
books, kept by the loader, knows what is really in memory.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from stack_store.cache import Lease, ResidentCache, Want, release_when_granted
from stack_store.errors import LoadFailed, MixTooLarge
from tests.fakes import ManualClock, ManualExecutor

BUDGET_BYTES = 10
SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 9}
MAX_BYPASS_SECONDS = 2.0
FAILURE_TTL_SECONDS = 5.0

keys = st.sampled_from(sorted(SIZES))
mixes = st.lists(keys, unique=True, max_size=3)


@dataclass(eq=False)
class Value:
    key: str
    is_loaded: bool = True


@dataclass
class Memory:
    """What is really loaded, and when what failed."""

    clock: ManualClock
    values: dict[str, Value] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    failed_at: dict[str, float] = field(default_factory=dict)

    def load(self, key: str) -> Value:
        assert key not in self.values, f"{key} is loaded twice"
        if key in self.failing:
            self.failed_at[key] = self.clock()
            raise OSError(key)
        self.values[key] = Value(key)
        assert sum(SIZES[loaded] for loaded in self.values) <= BUDGET_BYTES
        return self.values[key]

    def unload(self, value: Value) -> None:
        assert self.values.pop(value.key) is value
        value.is_loaded = False


@dataclass(eq=False)
class Asked:
    """A lease that was asked for."""

    mix: Sequence[str]
    at: float
    future: Future[Lease[Value]]
    released: bool = False


def _wants(mix: Sequence[str]) -> list[Want]:
    return [Want(key, SIZES[key]) for key in mix]


class CacheMachine(RuleBasedStateMachine):
    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.memory = Memory(self.clock)
        self.loads = ManualExecutor()
        self.all_asked: list[Asked] = []
        self.promises: list[Future[int] | Future[None]] = []
        self.in_order_of_age: list[Any] = []
        self.holders: list[Any] = []
        self.cache: ResidentCache[Value] = ResidentCache(
            budget_bytes=BUDGET_BYTES,
            load=self.memory.load,
            unload=self.memory.unload,
            max_bypass_seconds=MAX_BYPASS_SECONDS,
            failure_ttl_seconds=FAILURE_TTL_SECONDS,
            clock=self.clock,
            executor=self.loads,
        )

    @rule(target=asked, mix=mixes)
    def lease(self, mix: list[str]) -> object:
        try:
            asked = Asked(mix, self.clock(), self.cache.lease(_wants(mix)))
        except MixTooLarge:
            pinned = set(self.cache._pins)
            assert sum(SIZES[key] for key in pinned | set(mix)) > BUDGET_BYTES
            return multiple()
        self.all_asked.append(asked)
        return asked

    @precondition(lambda self: self.loads.jobs)
    @rule(data=st.data())
    def finish_a_load(self, data: st.DataObject) -> None:
        self.loads.run(data.draw(st.integers(0, len(self.loads.jobs) - 1)))

    @rule(asked=consumes(asked))
    def give_up(self, asked: Asked) -> None:
        asked.released = True
        release_when_granted(asked.future)

    @rule(asked=asked)
    def cancel(self, asked: Asked) -> None:
        asked.released |= asked.future.cancel()

    @rule(mix=mixes)
    def prefetch(self, mix: list[str]) -> None:
        with suppress(MixTooLarge):
            self.promises.append(self.cache.prefetch(_wants(mix)))

    @rule(key=keys)
    def pin(self, key: str) -> None:
        with suppress(MixTooLarge):
            self.promises.append(self.cache.pin(key, SIZES[key]))

    @rule(key=keys)
    def unpin(self, key: str) -> None:
        self.cache.unpin(key)

    @rule(key=keys)
    def retire(self, key: str) -> None:
        self.promises.append(self.cache.retire(key))

    @rule(key=keys)
    def break_or_mend(self, key: str) -> None:
        self.memory.failing ^= {key}

    @rule(seconds=st.sampled_from([0.5, 1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def the_books_add_up(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def what_is_leased_is_loaded(self) -> None:
        for asked in self.all_asked:
            if asked.released or not asked.future.done():
                continue
            error = asked.future.exception()
            if error is None:
                values = asked.future.result().values
                assert [value.key for value in values] == list(asked.mix)
                assert all(value.is_loaded for value in values)
            else:
                assert isinstance(error, LoadFailed)
                assert isinstance(error.__cause__, OSError)
                assert error.__cause__.args[0] in asked.mix

    @invariant()
    def nobody_passes_one_who_waits_but_for_a_moment_and_with_what_is_resident(self) -> None:
        waiting, holders = list(self.cache._waiting), [*self.cache._granted, *self.cache._leased]
        self.in_order_of_age += [request for request in (*waiting, *holders) if request not in self.in_order_of_age]
        for request in holders:
            age = self.in_order_of_age.index(request)
            passed = [older for older in self.in_order_of_age[:age] if older in waiting]
            if passed and request.wants and request not in self.holders:
                assert not request.pins
                assert not request.cold
                assert self.clock() - passed[0].asked_at < MAX_BYPASS_SECONDS
        self.holders = holders

    def teardown(self) -> None:
        """Everybody lets go of what he has: then everybody is answered, however much they wanted of each other's."""
        num_open = -1
        while num_open != (num_open := sum(not asked.released for asked in self.all_asked)) or self.loads.jobs:
            self.loads.run_all()
            for asked in self.all_asked:
                if asked.future.done() and not asked.released:
                    asked.released = True
                    release_when_granted(asked.future)
        assert all(asked.future.done() for asked in self.all_asked)
        for key in SIZES:
            self.cache.unpin(key)
        for promise in self.promises:
            assert promise.done()
            error = promise.exception()
            assert error is None or isinstance(error.__cause__, OSError)
        snapshot = self.cache.snapshot()
        assert (snapshot.waiting, snapshot.leased_bytes, snapshot.pinned_bytes) == (0, 0, 0)
        assert {entry.key for entry in snapshot.entries} == set(self.memory.values)
        self.cache.close()
        assert self.memory.values == {}


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
