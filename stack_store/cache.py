"""Keeps the most recently used domains resident within a budget of bytes. Knows keys and bytes, not devices or files.

Longer than most files because one lock guards one state: who waits, who loads, who holds.

A lease is all or nothing: it claims the bytes of everything it lacks at once, then loads. Claims are granted in order
of age, so two mixes never wait for each other's half. While the oldest waits, a younger lease goes ahead only if all
that it wants is resident, and only until the oldest has waited max_bypass_seconds: so no mix starves either.

Observer and unload are called with the lock held: they must be quick, must not raise and must not call the cache.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from cachetools import LRUCache, TTLCache

from stack_store.cache_observer import CacheObserver as CacheObserver
from stack_store.cache_observer import SilentObserver
from stack_store.cache_snapshot import CacheEntrySnapshot as CacheEntrySnapshot
from stack_store.cache_snapshot import CacheSnapshot as CacheSnapshot
from stack_store.errors import CacheClosed, CacheError, LoadFailed, MemoryExhausted, MixTooLarge
from stack_store.lease import Lease as Lease
from stack_store.lease import release_when_granted as release_when_granted
from stack_store.residents import Resident, Residents
from stack_store.residents import Want as Want

logger = logging.getLogger(__name__)

V = TypeVar("V")
T = TypeVar("T")
MAX_REMEMBERED_FAILURES = 1024


@dataclass(slots=True, eq=False)
class _Request(Generic[V]):
    """A lease that was asked for: waiting, then granted (its bytes are claimed), then leased (all is loaded)."""

    wants: tuple[Want, ...]
    asked_at: float
    pins: bool
    future: Future[Lease[V]] = field(default_factory=Future)
    granted_at: float | None = None
    cold: frozenset[str] = frozenset()

    def wants_key(self, key: str) -> bool:
        return any(want.key == key for want in self.wants)


class ResidentCache(Generic[V]):
    """Leases on values that `load` makes from their keys, at most budget_bytes of them at a time. Thread-safe."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        load: Callable[[str], V],
        unload: Callable[[V], None] = lambda value: None,
        num_loaders: int = 2,
        max_bypass_seconds: float = 2.0,
        failure_ttl_seconds: float = 5.0,
        observer: CacheObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        """`executor` runs the loads instead of num_loaders threads of the cache's own."""
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is {budget_bytes}, must be at least 1")
        self._load = load
        self._max_bypass_seconds = max_bypass_seconds
        self._observer = observer or SilentObserver()
        self._clock = clock
        self._executor = executor or ThreadPoolExecutor(num_loaders, thread_name_prefix="stack-loader")
        self._residents: Residents[V] = Residents(
            budget_bytes=budget_bytes, unload=unload, evicted=self._observer.evicted, clock=clock
        )
        self._lock = threading.Lock()
        self._waiting: list[_Request[V]] = []  # oldest first
        self._granted: list[_Request[V]] = []
        self._leased: list[_Request[V]] = []
        self._pins: dict[str, _Request[V]] = {}
        self._retiring: dict[str, list[Future[int]]] = {}
        self._failures: TTLCache[str, Exception] = TTLCache(MAX_REMEMBERED_FAILURES, failure_ttl_seconds, timer=clock)
        self._failing: LRUCache[str, None] = LRUCache(MAX_REMEMBERED_FAILURES)  # keys whose latest load failed
        self._answers: list[Callable[[], None]] = []  # given without the lock, since a future runs its callbacks
        self._closed = False

    @property
    def budget_bytes(self) -> int:
        return self._residents.budget_bytes

    def lease(self, wanted: Sequence[Want]) -> Future[Lease[V]]:
        """A lease on all wanted values, once all are resident. Who no longer wants it calls release_when_granted.

        The future fails with LoadFailed or CacheClosed. Raises MixTooLarge, CacheClosed, or ValueError for a key that
        is wanted twice. Whoever holds a lease must not wait for another: it could be waiting for the first.
        """
        with self._changing():
            return self._ask(tuple(wanted), pins=False).future

    def prefetch(self, wanted: Sequence[Want]) -> Future[None]:
        """Loads the values without holding them, in turn with the leases. Raises as lease does."""
        return _after(self.lease(wanted), Lease.release)

    def pin(self, key: str, num_bytes: int) -> Future[None]:
        """Loads the value and keeps it until unpin or retire: a lease that the cache holds itself. Idempotent.

        The future is done when the value is resident, or no longer pinned. Raises as lease does.
        """
        with self._changing():
            if key not in self._pins:
                self._pins[key] = self._ask((Want(key, num_bytes),), pins=True)
            future = self._pins[key].future
        return _after(future, lambda lease: None)

    def unpin(self, key: str) -> None:
        """Lets a pinned value be evicted again. Idempotent."""
        with self._lock:
            request = self._pins.pop(key, None)
        if request is not None:
            release_when_granted(request.future)

    def retire(self, key: str) -> Future[int]:
        """Unpins a deleted or replaced version and drops it as soon as no lease holds it or waits for it.

        The future gives the bytes freed, 0 if it was not resident.
        """
        self.unpin(key)
        future: Future[int] = Future()
        with self._changing():
            self._retiring.setdefault(key, []).append(future)
        return future

    def is_resident(self, key: str) -> bool:
        with self._lock:
            return self._residents.is_loaded(key)

    def leases(self, key: str) -> int:
        """How many leases hold the key, its pin aside."""
        with self._lock:
            return self._num_leases(key)

    def entry(self, key: str) -> CacheEntrySnapshot | None:
        """One resident as it is now, if it is one."""
        with self._lock:
            resident = self._residents.by_key.get(key)
            return None if resident is None else self._entry(resident)

    def snapshot(self) -> CacheSnapshot:
        with self._lock:
            entries = tuple(map(self._entry, self._residents.by_key.values()))
            return CacheSnapshot(
                budget_bytes=self._residents.budget_bytes,
                resident_bytes=self._residents.claimed_bytes,
                leased_bytes=sum(entry.bytes for entry in entries if entry.leases),
                pinned_bytes=sum(entry.bytes for entry in entries if entry.pinned),
                entries=entries,
                waiting=len(self._waiting),
            )

    def close(self) -> None:
        """Fails whoever waits, with CacheClosed, and unloads what no lease holds. Leases stay valid. Idempotent."""
        with self._changing():
            self._closed = True
            for request in [*self._waiting, *self._granted]:
                self._reject(request, CacheClosed("the cache is closed"))
        for key in list(self._pins):
            self.unpin(key)
        self._executor.shutdown(cancel_futures=True)
        with self._changing():
            for key in [key for key in self._residents.by_key if not self._residents.is_loaded(key)]:
                self._residents.drop(key)  # its load was cancelled

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not add up."""
        with self._lock:
            self._residents.check_integrity()
            for key, resident in self._residents.by_key.items():
                holders = [request for request in (*self._granted, *self._leased) if request.wants_key(key)]
                assert resident.holds == len(holders), f"{key} has {resident.holds} holds and {len(holders)} holders"
            for request in self._granted:
                assert any(not self._residents.is_loaded(want.key) for want in request.wants), (
                    "a lease waits for nothing"
                )
            assert not self._waiting or not self._may_be_granted(self._waiting[0], None), "the oldest waits for nothing"

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Every change of state: made under the lock, followed by all that it makes possible."""
        with self._lock:
            yield
            self._reject_failed()
            self._drop_retired()
            self._grant_waiting()
            self._observer.resident(self._residents.claimed_bytes)
            answers, self._answers = self._answers, []
        for answer in answers:
            answer()

    def _ask(self, wants: tuple[Want, ...], *, pins: bool) -> _Request[V]:
        if self._closed:
            raise CacheClosed("the cache is closed")
        self._require_fit(wants)
        request = _Request[V](wants=wants, asked_at=self._clock(), pins=pins)
        request.future.add_done_callback(partial(self._abandon, request))
        self._waiting.append(request)
        return request

    def _require_fit(self, wants: tuple[Want, ...]) -> None:
        if len({want.key for want in wants}) < len(wants):
            raise ValueError(f"a key is wanted twice: {[want.key for want in wants]}")
        pinned_bytes = sum(want.bytes for request in self._pins.values() for want in request.wants)
        num_bytes = sum(want.bytes for want in wants if want.key not in self._pins)
        budget_bytes = self._residents.budget_bytes
        if num_bytes > budget_bytes - pinned_bytes:
            raise MixTooLarge(
                f"the mix needs {num_bytes} bytes, the budget is {budget_bytes}, {pinned_bytes} of it pinned"
            )

    def _reject_failed(self) -> None:
        """Whoever waits for a key that failed a moment ago fails too, rather than load it again and again."""
        for request in list(self._waiting):
            failed = [want.key for want in request.wants if want.key in self._failures]
            if failed:
                self._reject(request, _load_failed(failed[0], self._failures[failed[0]]))

    def _drop_retired(self) -> None:
        for key in list(self._retiring):
            resident = self._residents.by_key.get(key)
            in_use = resident is not None and (resident.holds > 0 or resident.loaded is None)
            if not in_use and not any(request.wants_key(key) for request in self._waiting):
                num_bytes = 0 if resident is None else self._residents.drop(key)
                self._answers += [partial(_answer, future, num_bytes) for future in self._retiring.pop(key)]
        if self._closed:
            for key in self._residents.idle_keys():
                self._residents.drop(key)

    def _grant_waiting(self) -> None:
        oldest: _Request[V] | None = None
        for request in list(self._waiting):
            if self._may_be_granted(request, oldest):
                self._grant(request)
            else:
                oldest = oldest or request

    def _may_be_granted(self, request: _Request[V], oldest: _Request[V] | None) -> bool:
        """`oldest` is who waits for room already, if anybody does."""
        if oldest is None or not request.wants:
            return self._residents.has_room(request.wants)
        # A pin may not go ahead: it never ends, and the oldest may need its bytes.
        may_bypass = not request.pins and self._clock() - oldest.asked_at < self._max_bypass_seconds
        return may_bypass and all(self._residents.is_loaded(want.key) for want in request.wants)

    def _grant(self, request: _Request[V]) -> None:
        request.cold = frozenset(want.key for want in request.wants if not self._residents.is_loaded(want.key))
        request.granted_at = self._clock()
        for want in request.wants:
            self._observer.lookup(hit=want.key not in request.cold)
        self._waiting.remove(request)
        self._granted.append(request)
        for key in self._residents.hold(request.wants):
            self._executor.submit(self._run_load, key)
        self._lease_if_loaded(request)

    def _run_load(self, key: str) -> None:
        """In a loader's thread."""
        try:
            value = self._load(key)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is logged and belongs to those who wait
            self._log_failure(key, error)
            traceback.clear_frames(error.__traceback__)  # a remembered error must not keep half a domain in memory
            with self._changing():
                self._fail(key, error)
        else:
            with self._changing():
                self._finish(key, value)

    def _log_failure(self, key: str, error: Exception) -> None:
        """Once for each fault, however often the load is tried again; the tier below has told of its own."""
        if isinstance(error, LoadFailed):
            return
        with self._lock:
            is_new, self._failing[key] = key not in self._failing, None
        logger.log(logging.ERROR if is_new else logging.DEBUG, "domain load failed key=%s", key, exc_info=error)

    def _finish(self, key: str, value: V) -> None:
        self._residents.finish(key, value)
        if key in self._failing:
            del self._failing[key]
            logger.info("domain load healed key=%s", key)
        for request in list(self._granted):
            self._lease_if_loaded(request)

    def _fail(self, key: str, error: Exception) -> None:
        self._failures[key] = error
        if not isinstance(error, LoadFailed):
            self._observer.failed(key, error)
        for request in [request for request in self._granted if request.wants_key(key)]:
            self._reject(request, _load_failed(key, error))
        self._residents.drop(key)

    def _lease_if_loaded(self, request: _Request[V]) -> None:
        if not all(self._residents.is_loaded(want.key) for want in request.wants):
            return
        assert request.granted_at is not None
        self._granted.remove(request)
        self._leased.append(request)
        lease = Lease(
            [self._residents.by_key[want.key].value for want in request.wants],
            cold=request.cold,
            load_seconds=self._clock() - request.granted_at if request.cold else 0.0,
            give_back=partial(self._give_back, request),
        )
        self._answers.append(partial(_answer, request.future, lease))

    def _reject(self, request: _Request[V], error: CacheError) -> None:
        self._forget(request)
        self._pins = {key: pin for key, pin in self._pins.items() if pin is not request}
        self._answers.append(partial(_answer_error, request.future, error))

    def _give_back(self, request: _Request[V]) -> None:
        with self._changing():
            self._forget(request)

    def _abandon(self, request: _Request[V], future: Future[Lease[V]]) -> None:
        """The future is done. If it was cancelled, nobody will release what it holds."""
        if future.cancelled():
            self._give_back(request)

    def _forget(self, request: _Request[V]) -> None:
        """Takes the request out of wherever it is, with its hold. Idempotent."""
        if request in self._waiting:
            self._waiting.remove(request)
        for holders in (self._granted, self._leased):
            if request in holders:
                holders.remove(request)
                self._residents.unhold(request.wants)

    def _entry(self, resident: Resident[V]) -> CacheEntrySnapshot:
        return CacheEntrySnapshot(
            key=resident.key,
            bytes=resident.bytes,
            state="loading" if resident.loaded is None else "resident",
            leases=self._num_leases(resident.key),
            pinned=resident.key in self._pins,
            last_used=resident.last_used,
        )

    def _num_leases(self, key: str) -> int:
        resident, pin = self._residents.by_key.get(key), self._pins.get(key)
        is_held_by_pin = pin is not None and pin.granted_at is not None
        return 0 if resident is None else resident.holds - is_held_by_pin


def _load_failed(key: str, error: Exception) -> LoadFailed:
    lacks_memory = isinstance(error, MemoryError | MemoryExhausted)
    kind, reason = (MemoryExhausted, ": there is no memory for it") if lacks_memory else (LoadFailed, "")
    failure = kind(f"{key} could not be loaded{reason}")  # what else there is to say is in the log: it may name files
    failure.__cause__ = error
    return failure


def _answer(future: Future[T], result: T) -> None:
    # False if the future was cancelled meanwhile: then _abandon gives back what it holds.
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _answer_error(future: Future[T], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _after(leased: Future[Lease[V]], act: Callable[[Lease[V]], None]) -> Future[None]:
    """Done once the lease is granted and acted on, failed or abandoned."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()  # so that nobody can cancel it and think that the lease is, too

    def finish(leased: Future[Lease[V]]) -> None:
        error = None if leased.cancelled() else leased.exception()
        if error is not None:
            done.set_exception(error)
            return
        if not leased.cancelled():
            act(leased.result())
        done.set_result(None)

    leased.add_done_callback(finish)
    return done
