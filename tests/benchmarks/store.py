"""Measures the store under load: loads beside `dd`, a thousand domains beside five, Zipf traffic beside a simulation.

    python -m tests.benchmarks.store [loads] [thousand] [zipf] [--rounds N] [--json FILE]

`tests.benchmarks.stalls` measures what loads do to running streams.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.decode import interleave, processor_name
from tests.e2e.server_process import ServerProcess

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
MANY = 1000
HOT_SET = ("chat", "code", "math", "medical")
NUM_STREAMS = 8
STREAM_TOKENS = 48
FIRST_TOKENS = 40  # requests of one token a round
ZIPF_DOMAINS = 16
ZIPF_REQUESTS = 600
ZIPF_CLIENTS = 4


def main() -> None:
    """Measures what was asked for, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description="The store under load.")
    parser.add_argument("parts", nargs="*", default=["loads", "thousand", "zipf"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    measures: dict[str, Callable[[int], Any]] = {"loads": load_speeds, "thousand": thousand, "zipf": zipf}
    result: dict[str, Any] = {"processor": processor_name()}
    for part in arguments.parts:
        result[part] = measures[part](arguments.rounds)
        print(json.dumps({part: result[part]}, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


# Loads


def load_speeds(rounds: int) -> dict[str, Any]:
    """GB/s of files of the paper's size into a slot, cold and warm, against dd of the same file; seconds of a hit."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from engine.model.base import load_base
    from engine.model.moe_lora import MoeLoraConfig
    from engine.slot_memory import SlotMemory
    from engine.slots import prepare_loads, read_domain
    from stack_store.format import pack_groups, write_stack
    from stack_store.registry import StackRegistry
    from tests.stacks import header_for, random_projections

    torch.set_num_threads(1)
    base = load_base()
    prepare_loads(base.dtype)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as name:  # which is on a disk, as /tmp may not be
        folder = Path(name)
        registry = StackRegistry.create(folder / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
        config = MoeLoraConfig()
        for number in range(4):
            domain = f"domain-{number}"
            header = header_for(base.geometry, config, fingerprint=base.fingerprint, domain=domain)
            projections = random_projections(base.geometry, config, seed=number, size=0.01)
            write_stack(folder / "stack", header, pack_groups(header, projections))
            registry.register_domain(domain, [folder / "stack"])
        entries = registry.manifest.domains
        paths = [registry.stack_path(entry.stacks[0]) for entry in entries]
        num_bytes = entries[0].stacks[0].bytes
        memory = SlotMemory()
        load = partial(read_domain, registry, dtype=base.dtype, panelled=True, allocate=memory.allocate)

        def speed(act: Callable[[], Any], *, cold: bool, files: int = 1) -> float:
            for path in paths:
                if cold:
                    drop_pages(path)
                else:
                    path.read_bytes()
            began = time.perf_counter()
            kept = act()
            seconds = time.perf_counter() - began
            del kept
            return files * num_bytes / seconds / 1e9

        def dd_speed(*, cold: bool) -> float:
            speed(lambda: None, cold=cold)
            command = ["dd", f"if={paths[0]}", "of=/dev/null", "bs=1M"]
            told = subprocess.run(command, check=True, capture_output=True, text=True, env={"LC_ALL": "C"}).stderr
            found = re.search(r"copied, ([\d.e-]+) s", told)
            assert found is not None, told
            return num_bytes / float(found[1]) / 1e9

        def first() -> Any:
            registry.files.forget(entries[0].stacks[0].digest)
            return load(entries[0])

        def four_at_once() -> Any:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(load, entries))

        runs: dict[str, Callable[[], float]] = {
            "dd, cold": partial(dd_speed, cold=True),
            "load, cold": partial(speed, partial(load, entries[0]), cold=True),
            "four loads in two threads, cold": partial(speed, four_at_once, cold=True, files=4),
            "first load of a file, which hashes it, cold": partial(speed, first, cold=True),
            "dd, warm": partial(dd_speed, cold=False),
            "load, warm": partial(speed, partial(load, entries[0]), cold=False),
            "four loads in two threads, warm": partial(speed, four_at_once, cold=False, files=4),
        }
        found = interleave(runs, 2 * rounds)
        cold = [found[name]["median"] for name in ("load, cold", "dd, cold")]
        return {
            "file_bytes": num_bytes,
            "gb_per_second": found,
            "cold load of cold dd": cold[0] / cold[1],
            "hit_seconds": hit_seconds(registry, base),
        }


def drop_pages(path: Path) -> None:
    """The file's pages leave the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def hit_seconds(registry: Any, base: Any) -> dict[str, float]:
    """What it takes to lease a resident mix of two and to release it."""
    from engine.slots import ResidentDomain, load_domain
    from server.catalog import Catalog, Versions
    from stack_store.cache import ResidentCache

    versions = Versions()

    def load(key: str) -> ResidentDomain:
        return load_domain(registry, versions.entry(key), dtype=base.dtype, device=base.device, panelled=True)

    async def leased() -> list[float]:
        cache = ResidentCache[ResidentDomain](budget_bytes=1 << 30, load=load)
        catalog = Catalog(registry, cache, versions, dtype=base.dtype, lease_timeout_seconds=60)
        times = []
        for _ in range(2000):
            began = time.perf_counter()
            mix = await catalog.lease_mix({"domain-0": 1.0, "domain-1": 0.5}, adaptable=False)
            mix.release()
            times.append(time.perf_counter() - began)
        catalog.close()
        return sorted(times[10:])

    times = asyncio.run(leased())
    return {"median": statistics.median(times), "p99": times[int(0.99 * len(times))]}


# A thousand domains


def thousand(rounds: int) -> dict[str, Any]:
    """Two servers side by side, of the demo's five domains and of these among a thousand; ratios of medians."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        starts: dict[str, list[float]] = {"five": [], "thousand": []}
        stores = {name: copy_store(folder / name) for name in starts}
        add_domains(stores["thousand"], MANY - 5)
        for _ in range(3):
            for name, store in stores.items():
                starts[name].append(start_seconds(folder, store))
        servers = {name: stack.enter_context(server_on(folder, store)) for name, store in stores.items()}
        for server in servers.values():
            throughput(server)  # everything of the hot set is resident from now on
        speeds: dict[str, list[float]] = {name: [] for name in servers}
        firsts: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(2 * rounds):
            for name in sorted(servers, reverse=bool(number % 2)):
                speeds[name].append(throughput(servers[name]))
                firsts[name] += first_token_seconds(servers[name])
        rss = {name: resident_set_bytes(server) for name, server in servers.items()}
        median = {name: statistics.median(values) for name, values in speeds.items()}
        p99 = {name: sorted(values)[int(0.99 * (len(values) - 1))] for name, values in firsts.items()}
        p50 = {name: statistics.median(values) for name, values in firsts.items()}
        return {
            "resident_set_bytes": rss,
            "start_seconds": starts,
            "tokens_per_second": median,
            "p50_first_token_seconds": p50,
            "p99_first_token_seconds": p99,
            "ratios": {
                "resident set": rss["thousand"] / rss["five"],
                "start, seconds more": statistics.median(starts["thousand"]) - statistics.median(starts["five"]),
                "throughput": median["thousand"] / median["five"],
                "p99 to first token": p99["thousand"] / p99["five"],
            },
        }


def copy_store(path: Path) -> Path:
    """The demo store."""
    shutil.copytree(DEMO_STORE, path)
    return path


def add_domains(store: Path, count: int) -> None:
    """Sparse domains of the paper's size beside the demo's."""
    from stack_store.registry import StackRegistry
    from tests.sparse_stores import add_sparse_domains

    registry = StackRegistry.open(store)
    fingerprint, geometry = registry.manifest.base_fingerprint, registry.manifest.geometry
    registry.close()
    names = [f"domain-{number:04d}" for number in range(count)]
    add_sparse_domains(store, names, fingerprint=fingerprint, geometry=geometry)


def server_on(folder: Path, store: Path, **settings: object) -> ServerProcess:
    """In the base's own dtype, with room for the hot set."""
    return ServerProcess(
        store,
        folder / f"{store.name}.log",
        engine__dtype="auto",
        **{"store__device_budget_bytes": 400 << 20, **settings},
    )


def start_seconds(folder: Path, store: Path) -> float:
    """From the start of the process until it is ready."""
    began = time.perf_counter()
    with server_on(folder, store):
        return time.perf_counter() - began


def throughput(server: ServerProcess) -> float:
    """Tokens per second of streams over the hot set."""
    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        list(pool.map(partial(ask_domain, server, STREAM_TOKENS), (HOT_SET * NUM_STREAMS)[:NUM_STREAMS]))
    return NUM_STREAMS * STREAM_TOKENS / (time.perf_counter() - began)


def ask_domain(server: ServerProcess, tokens: int, domain: str) -> None:
    """One answer of so many tokens."""
    body = {
        "prompt": "Tell me about the sea.",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "brainstacks": {"mix": {domain: 1.0}},
    }
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).raise_for_status()


def first_token_seconds(server: ServerProcess) -> list[float]:
    """Of answers of one token, one after the other, over the hot set."""
    seconds = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(FIRST_TOKENS):
            mix = {HOT_SET[number % len(HOT_SET)]: 1.0}
            body = {"prompt": f"{number} ships", "max_tokens": 1, "temperature": 0, "brainstacks": {"mix": mix}}
            began = time.perf_counter()
            client.post("/v1/completions", json=body).raise_for_status()
            seconds.append(time.perf_counter() - began)
    return seconds


def resident_set_bytes(server: ServerProcess) -> int:
    """Of the server's process, as the system counts it."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


# Zipf traffic


def zipf(rounds: int) -> dict[str, Any]:
    """Hit rate of traffic over twice as many domains as fit, against an LRU that only counts, and the longest wait."""
    import torch

    from engine.model.moe_lora import MoeLoraConfig
    from stack_store.format import resident_bytes
    from stack_store.registry import StackRegistry
    from tests.sparse_stores import add_sparse_domains

    demo = StackRegistry.open(DEMO_STORE)
    fingerprint, geometry = demo.manifest.base_fingerprint, demo.manifest.geometry
    demo.close()
    names = [f"domain-{number:02d}" for number in range(ZIPF_DOMAINS)]
    draw = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(ZIPF_DOMAINS)]
    trace = draw.choices(names, weights, k=ZIPF_REQUESTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add_sparse_domains(
            folder / "zipf", names, fingerprint=fingerprint, geometry=geometry, config=MoeLoraConfig(rank=4, alpha=4.0)
        )
        registry = StackRegistry.open(folder / "zipf")
        one = resident_bytes(registry.header(registry.manifest.domains[0].stacks[0]), torch.bfloat16)
        registry.close()
        budget = ZIPF_DOMAINS // 2 * one
        with server_on(folder, folder / "zipf", store__device_budget_bytes=budget) as server:
            waits: list[float] = []
            with streaming(server):
                positions, lock = iter(trace), threading.Lock()

                def client() -> None:
                    while True:
                        with lock:
                            domain = next(positions, None)
                        if domain is None:
                            return
                        began = time.perf_counter()
                        ask_domain(server, 1, domain)
                        waits.append(time.perf_counter() - began)

                with ThreadPoolExecutor(ZIPF_CLIENTS) as pool:
                    for future in [pool.submit(client) for _ in range(ZIPF_CLIENTS)]:
                        future.result()
            hits, misses = (
                server.metric("brainstacks_stack_cache_lookups_total", tier="device", result=result)
                for result in ("hit", "miss")
            )
    simulated = lru_hit_rate(trace, ZIPF_DOMAINS // 2)
    assert len(waits) == ZIPF_REQUESTS
    assert hits + misses == ZIPF_REQUESTS
    return {
        "requests": ZIPF_REQUESTS,
        "clients": ZIPF_CLIENTS,
        "domains": ZIPF_DOMAINS,
        "domains that fit": ZIPF_DOMAINS // 2,
        "hit_rate": hits / ZIPF_REQUESTS,
        "simulated_hit_rate": simulated,
        "points apart": 100 * (hits / ZIPF_REQUESTS - simulated),
        "median_wait_seconds": statistics.median(waits),
        "longest_wait_seconds": max(waits),
    }


def lru_hit_rate(trace: Sequence[str], room: int) -> float:
    """Of a cache that holds so many, least recently used first out."""
    cached: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for domain in trace:
        hits += domain in cached
        cached[domain] = None
        cached.move_to_end(domain)
        if len(cached) > room:
            cached.popitem(last=False)
    return hits / len(trace)


@contextmanager
def streaming(server: ServerProcess) -> Iterator[None]:
    """Within the block, one stream of the base after the other decodes."""
    over = threading.Event()

    def stream() -> None:
        while not over.is_set():
            body = {"prompt": "Hi", "max_tokens": 100, "ignore_eos": True, "brainstacks": {"mode": "base"}}
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).raise_for_status()

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
