"""Real threads ask, cancel and retire at once: the budget holds, values in use stay loaded, everybody is answered."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from stack_store.cache import Lease, ResidentCache, Want, release_when_granted

BUDGET_BYTES = 10
WANTS = [Want("a", 2), Want("b", 3), Want("c", 4), Want("d", 5)]
MIXES = [mix for length in (1, 2) for mix in combinations(WANTS, length)]
NUM_CLIENTS = 8
NUM_REQUESTS = 150


class Memory:
    """Loads and unloads values, and never holds more than the budget."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = {want.key: want.bytes for want in WANTS}
        self.loaded: set[str] = set()
        self.num_loads = 0

    def load(self, key: str) -> str:
        with self._lock:
            assert key not in self.loaded, f"{key} is loaded twice"
            self.loaded.add(key)
            self.num_loads += 1
            assert sum(self._bytes[loaded] for loaded in self.loaded) <= BUDGET_BYTES
            return key

    def unload(self, key: str) -> None:
        with self._lock:
            self.loaded.remove(key)


def test_threads_that_want_each_others_domains_are_all_answered() -> None:
    memory = Memory()
    cache = ResidentCache(budget_bytes=BUDGET_BYTES, load=memory.load, unload=memory.unload, num_loaders=3)

    def client(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(NUM_REQUESTS):
            mix = chance.choice(MIXES)
            future = cache.lease(mix)
            if chance.random() < 0.2:
                release_when_granted(future)
            elif chance.random() < 0.1:
                cache.retire(mix[0].key)
                future.result(timeout=60).release()
            else:
                _use(future.result(timeout=60), mix, memory)

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        list(clients.map(client, range(NUM_CLIENTS)))
    cache.check_integrity()
    snapshot = cache.snapshot()
    assert (snapshot.waiting, snapshot.leased_bytes) == (0, 0)
    cache.close()
    assert memory.loaded == set()
    assert memory.num_loads > NUM_CLIENTS, "nothing was ever evicted"


def test_many_who_want_one_domain_wait_for_one_load() -> None:
    started, may_end = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(key: str) -> str:
        loads.append(key)
        started.set()
        assert may_end.wait(timeout=60)
        return key

    cache = ResidentCache(budget_bytes=BUDGET_BYTES, load=load)
    futures = [cache.lease([WANTS[0]]) for _ in range(20)]
    assert started.wait(timeout=60)
    assert not any(future.done() for future in futures)
    may_end.set()
    assert all(future.result(timeout=60).values == ("a",) for future in futures)
    assert loads == ["a"]
    cache.close()


def test_a_load_in_progress_holds_up_nobody_else() -> None:
    started, may_end = threading.Event(), threading.Event()

    def load(key: str) -> str:
        if key == "a":
            started.set()
            assert may_end.wait(timeout=60)
        return key

    cache = ResidentCache(budget_bytes=BUDGET_BYTES, load=load)
    slow = cache.lease([WANTS[0]])
    assert started.wait(timeout=60)
    cache.lease([WANTS[1]]).result(timeout=60).release()
    cache.lease([WANTS[1]]).result(timeout=60).release()
    assert not slow.done()
    may_end.set()
    slow.result(timeout=60).release()
    cache.close()


def test_closing_waits_for_the_load_in_progress_and_unloads_what_it_brought() -> None:
    memory, started, may_end = Memory(), threading.Event(), threading.Event()

    def load(key: str) -> str:
        started.set()
        assert may_end.wait(timeout=60)
        return memory.load(key)

    cache = ResidentCache(budget_bytes=BUDGET_BYTES, load=load, unload=memory.unload, num_loaders=1)
    in_progress, queued = cache.lease([WANTS[0]]), cache.lease([WANTS[1]])
    assert started.wait(timeout=60)
    in_progress.add_done_callback(lambda future: may_end.set())
    cache.close()
    assert in_progress.exception(timeout=60) is not None
    assert queued.exception(timeout=60) is not None
    assert memory.num_loads == 1
    assert memory.loaded == set()


def _use(lease: Lease[str], mix: tuple[Want, ...], memory: Memory) -> None:
    assert lease.values == tuple(want.key for want in mix)
    assert set(lease.values) <= memory.loaded
    lease.release()
