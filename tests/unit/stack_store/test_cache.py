"""What a cache promises about leases, pins, failures and the end of a version, one promise a test.

Loads run when the test says: a ManualExecutor stands for the loader threads, a ManualClock for time.
"""

import weakref
from concurrent.futures import CancelledError, Future

import pytest

from stack_store.cache import CacheSnapshot, Lease, ResidentCache, Want, release_when_granted
from stack_store.errors import CacheClosed, LoadFailed, MemoryExhausted, MixTooLarge
from tests.fakes import ManualClock, ManualExecutor

A, B, C, D = Want("a", 10), Want("b", 10), Want("c", 10), Want("d", 10)


class Value:
    """Something that is weakly referable, as tensors are."""

    def __init__(self, key: str) -> None:
        self.key = key


class Notes:
    """A CacheObserver that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self.resident_bytes = 0

    def lookup(self, hit: bool) -> None:
        self.heard.append(("lookup", hit))

    def evicted(self, key: str, num_bytes: int) -> None:
        self.heard.append(("evicted", key, num_bytes))

    def failed(self, key: str, error: Exception) -> None:
        self.heard.append(("failed", key, str(error)))

    def resident(self, num_bytes: int) -> None:
        self.resident_bytes = num_bytes


class Bench:
    """A cache of `budget_bytes` with everything around it in the test's hands."""

    def __init__(self, budget_bytes: int = 20) -> None:
        self.clock = ManualClock()
        self.loads = ManualExecutor()
        self.notes = Notes()
        self.failing: set[str] = set()
        self.asked_to_load: list[str] = []
        self.unloaded: list[str] = []
        self.cache: ResidentCache[Value] = ResidentCache(
            budget_bytes=budget_bytes,
            load=self._load,
            unload=lambda value: self.unloaded.append(value.key),
            max_bypass_seconds=2.0,
            failure_ttl_seconds=5.0,
            observer=self.notes,
            clock=self.clock,
            executor=self.loads,
        )

    def leased(self, *wants: Want) -> Lease[Value]:
        future = self.cache.lease(wants)
        self.loads.run_all()
        return future.result(timeout=0)

    def make_idle(self, *wants: Want) -> None:
        for want in wants:
            self.leased(want).release()

    def _load(self, key: str) -> Value:
        self.asked_to_load.append(key)
        self.clock.advance(0.5)
        if key in self.failing:
            raise OSError(f"{key} is broken")
        return Value(key)


def test_a_lease_holds_values_in_wanted_order() -> None:
    bench = Bench()
    lease = bench.leased(B, A)
    assert [value.key for value in lease.values] == ["b", "a"]
    assert lease.cold == {"a", "b"}
    assert lease.load_seconds == 1.0
    assert (bench.cache.leases("a"), bench.cache.is_resident("a")) == (1, True)
    lease.release()
    assert (bench.cache.leases("a"), bench.cache.is_resident("a")) == (0, True)
    bench.cache.check_integrity()


def test_what_is_resident_is_leased_at_once() -> None:
    bench = Bench()
    bench.make_idle(A)
    future = bench.cache.lease([A])
    assert future.result(timeout=0).cold == frozenset()
    assert future.result(timeout=0).load_seconds == 0.0
    assert bench.asked_to_load == ["a"]


def test_an_empty_lease_waits_for_nobody() -> None:
    bench = Bench(budget_bytes=10)
    bench.leased(A)
    bench.cache.lease([B])
    bench.clock.advance(100)
    assert bench.cache.lease([]).result(timeout=0).values == ()


def test_release_is_idempotent() -> None:
    bench = Bench()
    first, second = bench.leased(A), bench.leased(A)
    first.release()
    first.release()
    assert bench.cache.leases("a") == 1
    second.release()
    bench.cache.check_integrity()


def test_a_released_lease_keeps_no_value_alive() -> None:
    bench = Bench(budget_bytes=10)
    lease = bench.leased(A)
    value = weakref.ref(lease.values[0])
    lease.release()
    bench.make_idle(B)
    assert value() is None
    with pytest.raises(AssertionError, match="the lease was released"):
        _ = lease.values


def test_one_load_serves_all_who_wait_for_it() -> None:
    bench = Bench()
    futures = [bench.cache.lease([A]), bench.cache.lease([A, B]), bench.cache.lease([A])]
    bench.loads.run_all()
    assert {future.result(timeout=0).values[0] for future in futures} == {futures[0].result().values[0]}
    assert bench.asked_to_load == ["a", "b"]


def test_the_least_recently_used_is_evicted() -> None:
    bench = Bench()
    bench.make_idle(A, B, A)
    bench.make_idle(C)
    assert bench.unloaded == ["b"]
    assert ("evicted", "b", 10) in bench.notes.heard
    assert bench.notes.resident_bytes == 20


def test_what_is_leased_is_not_evicted() -> None:
    bench = Bench()
    held = bench.leased(A)
    bench.make_idle(B)
    bench.make_idle(C)
    assert bench.unloaded == ["b"]
    waiting = bench.cache.lease([B, D])
    assert not waiting.done()
    assert bench.cache.snapshot().waiting == 1
    held.release()
    bench.loads.run_all()
    assert [value.key for value in waiting.result(timeout=0).values] == ["b", "d"]


def test_no_lease_waits_with_half_of_what_it_wants() -> None:
    bench = Bench()
    held = bench.leased(A)
    ab, cd = bench.cache.lease([B, C]), bench.cache.lease([C, D])
    assert bench.cache.snapshot().resident_bytes == 10, "neither claims anything before it can claim all"
    held.release()
    bench.loads.run_all()
    ab.result(timeout=0).release()
    bench.loads.run_all()
    cd.result(timeout=0).release()
    bench.cache.check_integrity()


def test_a_mix_larger_than_the_budget_is_refused_with_the_numbers() -> None:
    bench = Bench()
    with pytest.raises(MixTooLarge, match="needs 30 bytes, the budget is 20, 0 of it pinned"):
        bench.cache.lease([A, B, C])
    bench.cache.pin("a", 10)
    with pytest.raises(MixTooLarge, match="needs 20 bytes, the budget is 20, 10 of it pinned"):
        bench.cache.lease([B, C])
    assert [value.key for value in bench.leased(A, B).values] == ["a", "b"]
    with pytest.raises(MixTooLarge, match="needs 11 bytes, the budget is 20, 10 of it pinned"):
        bench.cache.pin("x", 11)


def test_a_key_wanted_twice_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="a key is wanted twice"):
        Bench().cache.lease([A, A])
    with pytest.raises(ValueError, match="want 'a' has 0 bytes"):
        Want("a", 0)
    with pytest.raises(ValueError, match="budget_bytes is 0"):
        Bench(budget_bytes=0)


def test_a_resident_mix_passes_one_that_waits_but_not_for_ever() -> None:
    bench = Bench()
    held = bench.leased(A)
    oldest = bench.cache.lease([B, C])
    bench.clock.advance(1.9)
    bench.leased(A).release()
    assert not bench.cache.lease([B]).done(), "b is not resident, so it must wait its turn"
    bench.clock.advance(0.1)
    late = bench.cache.lease([A])
    assert not late.done(), "the oldest has waited long enough"
    held.release()
    bench.loads.run_all()
    oldest.result(timeout=0).release()
    bench.loads.run_all()
    assert late.done()


def test_a_pin_never_passes_one_that_waits() -> None:
    bench = Bench(budget_bytes=30)
    bench.make_idle(A)
    held = bench.leased(B)
    oldest = bench.cache.lease([C, D, Want("e", 5)])
    pin = bench.cache.pin("a", 10)
    assert not pin.done()
    held.release()
    bench.loads.run_all()
    oldest.result(timeout=0).release()
    bench.loads.run_all()
    assert pin.done()


def test_a_failed_load_fails_those_who_want_it_and_nobody_else() -> None:
    bench = Bench(budget_bytes=30)
    bench.failing = {"b"}
    alone, mixed, failing = bench.cache.lease([A]), bench.cache.lease([A, B]), bench.cache.lease([C, B])
    bench.loads.run_all()
    assert alone.result(timeout=0).values[0].key == "a"
    for future in (mixed, failing):
        with pytest.raises(LoadFailed, match=r"^b could not be loaded$") as failure:
            future.result(timeout=0)
        assert isinstance(failure.value.__cause__, OSError)
    assert ("failed", "b", "b is broken") in bench.notes.heard
    assert bench.cache.leases("a") == 1
    assert not bench.cache.is_resident("b")
    bench.cache.check_integrity()


def test_a_failed_load_is_not_tried_again_at_once() -> None:
    bench = Bench()
    bench.failing = {"b"}
    bench.cache.lease([B])
    bench.loads.run_all()
    bench.failing = set()
    bench.clock.advance(4.9)
    assert isinstance(bench.cache.lease([A, B]).exception(timeout=0), LoadFailed)
    assert bench.asked_to_load == ["b"]
    bench.clock.advance(0.1)
    assert bench.leased(B).values[0].key == "b"


def test_a_load_that_goes_on_failing_is_told_once_and_told_when_it_heals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench = Bench()
    for failing in ({"b"}, {"b"}, set[str](), {"b"}):
        bench.failing = failing
        future = bench.cache.lease([B])
        bench.loads.run_all()
        if future.exception(timeout=0) is None:
            future.result(timeout=0).release()
            bench.cache.retire("b")
        bench.clock.advance(5.0)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [
        ("ERROR", "domain load failed key=b"),
        ("INFO", "domain load healed key=b"),
        ("ERROR", "domain load failed key=b"),
    ]
    assert [heard for heard in bench.notes.heard if heard[0] == "failed"] == [("failed", "b", "b is broken")] * 3


def test_a_load_without_memory_says_that() -> None:
    def load(key: str) -> Value:
        raise MemoryError("no memory for 10 bytes")

    loads = ManualExecutor()
    cache = ResidentCache(budget_bytes=10, load=load, executor=loads)
    future = cache.lease([A])
    loads.run_all()
    with pytest.raises(MemoryExhausted, match="a could not be loaded: there is no memory for it"):
        future.result(timeout=0)


def test_a_failed_load_fails_those_who_wait_for_room_for_it() -> None:
    bench = Bench(budget_bytes=10)
    bench.failing = {"b"}
    loading, waiting, other = bench.cache.lease([B]), bench.cache.lease([B]), bench.cache.lease([A])
    bench.loads.run_all()
    assert isinstance(loading.exception(timeout=0), LoadFailed)
    assert isinstance(waiting.exception(timeout=0), LoadFailed)
    assert other.result(timeout=0).values[0].key == "a"
    assert bench.asked_to_load == ["b", "a"]


def test_a_remembered_failure_keeps_no_half_loaded_value_alive() -> None:
    halves: list[weakref.ref[Value]] = []

    def load(key: str) -> Value:
        half = Value(key)
        halves.append(weakref.ref(half))
        raise OSError("broken")

    loads = ManualExecutor()
    cache = ResidentCache(budget_bytes=10, load=load, executor=loads)
    future = cache.lease([A])
    loads.run_all()
    assert isinstance(future.exception(timeout=0), LoadFailed)
    assert halves[0]() is None


def test_a_cancelled_lease_gives_back_its_place_in_the_queue() -> None:
    bench = Bench()
    held = bench.leased(A)
    waiting, next_in_line = bench.cache.lease([B, C]), bench.cache.lease([B])
    assert not next_in_line.done()
    assert waiting.cancel()
    bench.loads.run_all()
    assert next_in_line.done()
    held.release()
    bench.cache.check_integrity()


def test_a_cancelled_lease_gives_back_its_bytes_once_they_are_loaded() -> None:
    bench = Bench(budget_bytes=10)
    loading, waiting = bench.cache.lease([A]), bench.cache.lease([B])
    assert loading.cancel()
    assert not waiting.done()
    bench.loads.run_all()
    assert waiting.result(timeout=0).values[0].key == "b"
    with pytest.raises(CancelledError):
        loading.result(timeout=0)
    assert bench.unloaded == ["a"]
    bench.cache.check_integrity()


def test_a_lease_that_is_given_up_is_released_whether_it_was_granted_or_not() -> None:
    bench = Bench()
    granted, loading = bench.cache.lease([A]), bench.cache.lease([B])
    bench.loads.run_next()
    assert granted.done()
    assert not granted.cancel(), "cancelling alone does nothing any more"
    release_when_granted(granted)
    release_when_granted(loading)
    bench.loads.run_all()
    assert (bench.cache.leases("a"), bench.cache.leases("b")) == (0, 0)
    bench.cache.check_integrity()


def test_a_lease_may_be_released_by_the_callback_that_receives_it() -> None:
    bench = Bench()
    future = bench.cache.lease([A])
    future.add_done_callback(lambda done: done.result().release())
    bench.loads.run_all()
    assert bench.cache.leases("a") == 0


def test_a_pinned_value_stays_until_it_is_unpinned() -> None:
    bench = Bench()
    pin = bench.cache.pin("a", 10)
    assert not pin.done()
    assert bench.cache.pin("a", 10) is not pin
    bench.loads.run_all()
    assert pin.done()
    bench.make_idle(B)
    bench.make_idle(C)
    bench.make_idle(D)
    assert bench.unloaded == ["b", "c"]
    assert bench.cache.leases("a") == 0, "a pin is no lease"
    bench.cache.unpin("a")
    bench.cache.unpin("a")
    bench.leased(B, C)
    assert bench.unloaded == ["b", "c", "d", "a"]
    bench.cache.check_integrity()


def test_a_pin_that_is_taken_back_while_it_loads_holds_nothing() -> None:
    bench = Bench(budget_bytes=10)
    pin = bench.cache.pin("a", 10)
    bench.cache.unpin("a")
    assert pin.result(timeout=0) is None
    bench.loads.run_all()
    bench.leased(B)
    assert bench.unloaded == ["a"]
    bench.cache.check_integrity()


def test_a_pin_that_fails_to_load_is_no_pin() -> None:
    bench = Bench()
    bench.failing = {"a"}
    pin = bench.cache.pin("a", 10)
    bench.loads.run_all()
    assert isinstance(pin.exception(timeout=0), LoadFailed)
    assert bench.cache.snapshot().pinned_bytes == 0
    bench.leased(B, C)


def test_a_prefetched_value_is_resident_and_idle() -> None:
    bench = Bench()
    done = bench.cache.prefetch([A, B])
    bench.loads.run_all()
    assert done.result(timeout=0) is None
    assert bench.cache.is_resident("a")
    assert bench.cache.leases("a") == 0
    assert bench.cache.lease([A, B]).result(timeout=0).cold == frozenset()


def test_a_retired_version_goes_with_its_last_lease() -> None:
    bench = Bench()
    first, second = bench.leased(A), bench.leased(A)
    freed = bench.cache.retire("a")
    first.release()
    assert not freed.done()
    assert second.values[0].key == "a"
    second.release()
    assert freed.result(timeout=0) == 10
    assert bench.unloaded == ["a"]
    assert not bench.cache.is_resident("a")
    assert ("evicted", "a", 10) not in bench.notes.heard, "nobody's room was short"


def test_a_retired_version_that_nobody_holds_goes_at_once() -> None:
    bench = Bench()
    bench.make_idle(A)
    assert bench.cache.retire("a").result(timeout=0) == 10
    assert bench.cache.retire("a").result(timeout=0) == 0


def test_a_retired_version_still_serves_those_who_wait_for_it() -> None:
    bench = Bench(budget_bytes=10)
    held = bench.leased(A)
    waiting = bench.cache.lease([B])
    freed = bench.cache.retire("b")
    assert not freed.done()
    held.release()
    bench.loads.run_all()
    waiting.result(timeout=0).release()
    assert freed.result(timeout=0) == 10


def test_a_retired_pin_is_unpinned() -> None:
    bench = Bench()
    bench.cache.pin("a", 10)
    bench.loads.run_all()
    assert bench.cache.retire("a").result(timeout=0) == 10
    loading = bench.cache.pin("b", 10)
    freed = bench.cache.retire("b")
    assert not freed.done()
    bench.loads.run_all()
    assert loading.done()
    assert freed.result(timeout=0) == 10
    bench.cache.check_integrity()


def test_a_retired_version_may_be_leased_anew() -> None:
    bench = Bench()
    bench.make_idle(A)
    bench.cache.retire("a")
    assert bench.leased(A).cold == {"a"}


def test_hits_and_misses_are_told_apart() -> None:
    bench = Bench()
    bench.make_idle(A)
    bench.leased(A, B)
    lookups = [heard for heard in bench.notes.heard if heard[0] == "lookup"]
    assert lookups == [("lookup", False), ("lookup", True), ("lookup", False)]


def test_a_snapshot_shows_who_is_where() -> None:
    bench = Bench(budget_bytes=40)
    bench.cache.pin("a", 10)
    bench.loads.run_all()
    bench.leased(B)
    bench.cache.lease([C])
    snapshot = bench.cache.snapshot()
    assert isinstance(snapshot, CacheSnapshot)
    assert (snapshot.budget_bytes, snapshot.resident_bytes, snapshot.waiting) == (40, 30, 0)
    assert (snapshot.leased_bytes, snapshot.pinned_bytes) == (20, 10)
    seen = [(entry.key, entry.state, entry.leases, entry.pinned) for entry in snapshot.entries]
    assert seen == [("a", "resident", 0, True), ("b", "resident", 1, False), ("c", "loading", 1, False)]


def test_a_closed_cache_fails_who_waits_and_unloads_what_nobody_holds() -> None:
    bench = Bench(budget_bytes=40)
    bench.make_idle(A)
    bench.cache.pin("b", 10)
    held = bench.leased(C)
    loading, waiting = bench.cache.lease([D]), bench.cache.lease([Want("e", 30)])
    bench.cache.close()
    for future in (loading, waiting):
        assert isinstance(future.exception(timeout=0), CacheClosed)
    assert sorted(bench.unloaded) == ["a", "b"]
    with pytest.raises(CacheClosed):
        bench.cache.lease([A])
    assert held.values[0].key == "c"
    held.release()
    assert bench.cache.snapshot().entries == ()
    bench.cache.close()
    bench.cache.check_integrity()


def test_integrity_is_really_checked() -> None:
    bench = Bench()
    bench.leased(A)
    bench.cache._residents.by_key["a"].holds += 1
    with pytest.raises(AssertionError, match="a has 2 holds and 1 holders"):
        bench.cache.check_integrity()
    bench.cache._residents.by_key["a"].bytes = 21
    with pytest.raises(AssertionError, match="21 of 20 bytes are claimed"):
        bench.cache.check_integrity()


def test_answers_are_futures_of_the_standard_library() -> None:
    bench = Bench()
    assert isinstance(bench.cache.lease([A]), Future)
