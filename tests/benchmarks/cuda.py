"""Measures a CUDA device: decode speed of mixes with and without captured graphs, loads by tier, streams beside loads.

    python -m tests.benchmarks.cuda [--rounds N] [--tokens N] [--json FILE]

The base is a random Llama of TinyLlama's shape, so that nothing needs to be downloaded; stacks have the paper's size
(4 experts of rank 16, 2 active) and random weights. Peers in the same process: transformers' `generate` of the same
base, a plain copy from pinned memory, and `dd` of the same files.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks.decode import engine_speed, interleave, mixed_route

ROWS = (1, 16)
DOMAINS = (0, 1, 4)
NUM_FILES = 6
TINYLLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def main() -> None:
    """Builds the base, measures, prints."""
    parser = argparse.ArgumentParser(description="Decoding and loads on a CUDA device.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(result, flush=True)
        result["loads"] = load_speeds(Path(folder), arguments.rounds)
        for name, value in result["loads"].items():
            print(f"{name:52} {value['median']:9.3f} GB/s ({value['min']:.3f} to {value['max']:.3f})", flush=True)
        result["milliseconds_per_token"] = beside_loads(Path(folder), arguments.tokens * 8)
        for name, value in result["milliseconds_per_token"].items():
            print(
                f"{name:52} median {value['median']:.2f}  p99 {value['p99']:.2f} ms  loads {value['loads']}", flush=True
            )
        result["tokens_per_second"] = decode_speeds(Path(folder), arguments.rounds, arguments.tokens)
        for name, value in result["tokens_per_second"].items():
            print(f"{name:52} {value['median']:9.1f} tokens/s ({value['min']:.1f} to {value['max']:.1f})", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def make_base(folder: Path) -> Path:
    """A random Llama of TinyLlama's shape, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_bases import tiny_tokenizer

    path = folder / "base"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = LlamaConfig(**TINYLLAMA, bos_token_id=0, eos_token_id=2, pad_token_id=2)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(TINYLLAMA["vocab_size"] - len(tokenizer))])
    tokenizer.save_pretrained(path)
    return path


def decode_speeds(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Decode tokens per second of all rows together: captured, by modules, and of transformers."""
    import torch

    from engine.engine import Engine
    from engine.model.base import load_base
    from tests.benchmarks.peers import generate_seconds

    found: dict[str, Callable[[], float]] = {}
    engines = []
    for name, is_static in (("graphs", True), ("modules", False)):
        base = load_base(str(make_base(folder)), base_format="nf4", device="cuda")
        with captured(is_static):
            engine = Engine(base, max_batch_rows=max(ROWS), max_model_len=1024, kv_cache_tokens=65536)
        engine.start()
        engines.append(engine)
        if not found:
            domains = [random_domain(base, seed) for seed in range(max(DOMAINS))]
        for rows in ROWS:
            for count in DOMAINS:
                mixes = [[(domain, 1.0) for domain in domains[:count]]] * rows
                found[f"{name}, {count} domains, {rows} rows"] = partial(engine_speed, engine, tokens, mixes)
            routes = [mixed_route(domains[:4], row) for row in range(rows)]
            found[f"{name}, mixed routes, {rows} rows"] = partial(engine_speed, engine, tokens, routes)
    peer = load_base(str(make_base(folder)), base_format="nf4", device="cuda")
    for rows in ROWS:
        found[f"transformers generate, base, {rows} rows"] = partial(
            peer_speed, peer.model, rows, tokens, generate_seconds
        )
    speeds = interleave(found, rounds)
    for engine in engines:
        engine.stop()
    torch.cuda.synchronize()
    return speeds


def peer_speed(model: Any, rows: int, tokens: int, generate_seconds: Any) -> float:
    """Of transformers' own loop; the first token, the prefill's, does not count."""
    import torch

    prompts = torch.stack([torch.arange(100 + row, 132 + row, device="cuda") for row in range(rows)])
    return rows * tokens / generate_seconds(model, prompts, tokens)[1]


@contextmanager
def captured(is_static: bool) -> Iterator[None]:
    """Engines made in the block decode by graphs, or do not."""
    module: Any = import_module("engine.engine")
    runner = module.Runner
    module.Runner = partial(runner, static_decode=is_static)
    try:
        yield
    finally:
        module.Runner = runner


def random_domain(base: Any, seed: int) -> Any:
    """One stack of random weights on the device."""
    from engine.model.moe_lora import MoeLoraConfig
    from engine.slots import ResidentDomain
    from tests.stacks import random_projections, to_serving

    config = MoeLoraConfig()
    projections = random_projections(base.geometry, config, seed=seed, size=0.001)
    stack = to_serving(base.geometry, config, projections, dtype=base.dtype, device=base.device)
    return ResidentDomain(f"domain-{seed}", str(seed), (stack,))


def write_store(folder: Path, base: Any) -> Any:
    """A store of NUM_FILES domains, whose bytes are all there."""
    from engine.model.moe_lora import MoeLoraConfig
    from stack_store.format import pack_groups, write_stack
    from stack_store.registry import StackRegistry
    from tests.stacks import header_for, random_projections

    registry = StackRegistry.create(folder / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
    config = MoeLoraConfig()
    for number in range(NUM_FILES):
        header = header_for(base.geometry, config, fingerprint=base.fingerprint, domain=f"domain-{number}")
        projections = random_projections(base.geometry, config, seed=number, size=0.001)
        write_stack(folder / "stack.safetensors", header, pack_groups(header, projections))
        registry.register_domain(f"domain-{number}", [folder / "stack.safetensors"])
    return registry


def load_speeds(folder: Path, rounds: int) -> dict[str, Any]:
    """GB/s of each way between the tiers, and of its peer."""
    import torch

    from engine.model.base import load_base
    from engine.slot_memory import SlotMemory
    from engine.slots import copy_domain, prepare_loads, read_domain

    base = load_base(str(make_base(folder)), base_format="dense", device="cuda")
    registry = write_store(folder, base)
    prepare_loads(base.dtype)
    entry = registry.domain("domain-0")
    path, num_bytes = registry.stack_path(entry.stacks[0]), entry.stacks[0].bytes
    pinned = SlotMemory.for_copies_to(base.device)
    read = partial(read_domain, registry, entry, dtype=base.dtype)
    host = read(allocate=pinned.allocate)
    plain = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def speed(act: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        before()
        torch.cuda.synchronize()
        began = time.perf_counter()
        kept = act()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        del kept
        return num_bytes / seconds / 1e9

    drop = partial(drop_pages, path)
    dd = partial(subprocess.run, ["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)
    runs: dict[str, Callable[[], float]] = {
        "dd, cold": partial(speed, dd, drop),
        "file to pinned host memory, cold": partial(speed, partial(read, allocate=pinned.allocate), drop),
        "dd, warm": partial(speed, dd),
        "file to pinned host memory, warm": partial(speed, partial(read, allocate=pinned.allocate)),
        "file to host memory, warm": partial(speed, read),
        "pinning that much memory": partial(
            speed, lambda: SlotMemory.for_copies_to(base.device).allocate(num_bytes, torch.uint8)
        ),
        "pinned host memory to device": partial(speed, partial(copy_domain, host, base.device)),
        "plain copy from pinned memory": partial(speed, partial(target.copy_, plain, non_blocking=True)),
    }
    return interleave(runs, rounds)


def drop_pages(path: Path) -> None:
    """The file's pages leave the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def beside_loads(folder: Path, tokens: int) -> dict[str, Any]:
    """Time per token of eight mixed streams: alone, beside copies from the host, and beside loads from files."""
    import torch

    from engine.engine import Engine
    from engine.model.base import load_base
    from engine.slot_memory import SlotMemory
    from engine.slots import copy_domain, prepare_loads, read_domain
    from stack_store.registry import StackRegistry

    base = load_base(str(make_base(folder)), base_format="nf4", device="cuda")
    registry = StackRegistry.open(folder / "store")
    prepare_loads(base.dtype)
    entries = registry.manifest.domains
    read = partial(read_domain, registry, dtype=base.dtype, allocate=SlotMemory.for_copies_to(base.device).allocate)
    engine = Engine(base, max_batch_rows=8, max_model_len=1024, kv_cache_tokens=65536)
    engine.start()
    hosts = [read(entry) for entry in entries]
    domains = [random_domain(base, seed) for seed in range(4)]
    loaders: dict[str, Callable[[int], Any] | None] = {
        "alone": None,
        "beside copies from the host": lambda turn: copy_domain(hosts[turn % len(hosts)], base.device),
        "beside loads from files": lambda turn: copy_domain(read(entries[turn % len(entries)]), base.device),
    }
    found = {}
    for name, load in loaders.items():
        gaps, loads = token_gaps(engine, domains, tokens, load)
        ordered = sorted(1000 * gap for gap in gaps)
        found[f"eight streams, {name}"] = {
            "median": statistics.median(ordered),
            "p99": ordered[int(0.99 * (len(ordered) - 1))],
            "loads": loads,
        }
    engine.stop()
    torch.cuda.synchronize()
    return found


def token_gaps(
    engine: Any, domains: list[Any], tokens: int, load: Callable[[int], Any] | None
) -> tuple[list[float], int]:
    """Seconds between two tokens of each of eight streams, and how many loads ran meanwhile, one after the other."""
    from engine.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent

    times: list[list[float]] = [[] for _ in range(8)]
    done = [threading.Event() for _ in range(8)]
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    def heard(row: int, event: Any) -> None:
        if isinstance(event, TokensEvent):
            times[row].append(time.perf_counter())
        elif isinstance(event, FinishedEvent):
            done[row].set()

    for row in range(8):
        request = GenerationRequest(
            f"{id(times)}-{row}", tuple(range(100 + row, 132 + row)), sampling, tuple(mixed_route(domains, row))
        )
        engine.submit(request, partial(heard, row))
    loads = 0
    while not all(event.is_set() for event in done):
        if load is None:
            time.sleep(0.01)
            continue
        load(loads)
        loads += 1
    gaps = [later - earlier for row in times for earlier, later in pairwise(row[8:])]
    return gaps, loads


if __name__ == "__main__":
    main()
