"""Measures what a mix costs: decode speed of the base and of mixes, the router's share, and a cold load.

    python -m tests.benchmarks.decode [--rounds N] [--tokens N] [--threads N]

Everything is measured in one process, the settings interleaved round by round, and printed as a table of medians with
their spread and one JSON line. The peer is transformers' `generate` on the same base with the same weights.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
BATCHES = (1, 8)
PROMPT_TOKENS = 32
QUESTION = "A farmer has 17 sheep and buys 5 more every month. How many sheep does he have after one year and a half?"


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="Decode speed of the base and of mixes.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    result = measure(arguments.rounds, arguments.tokens)
    print_table(result)
    print(json.dumps(result))


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Every number, by name; speeds in tokens per second, times in seconds."""
    import torch
    import transformers

    from engine.engine import Engine
    from engine.model.base import load_base
    from engine.slots import load_domain
    from stack_store.registry import StackRegistry

    peer = load_base(base_format="nf4")
    base = load_base()
    registry = StackRegistry.open(DEMO_STORE, base_fingerprint=base.fingerprint, geometry=base.geometry)
    entries = registry.manifest.domains
    domains = [load_domain(registry, entry, dtype=base.dtype, device=base.device) for entry in entries]
    engine = Engine(base, max_batch_rows=max(BATCHES), max_model_len=512, kv_cache_tokens=8192)
    engine.start()
    runs: dict[str, Callable[[], float]] = {}
    for batch in BATCHES:
        runs[f"transformers generate, base, batch {batch}"] = partial(generate_speed, peer, batch, tokens)
        for count in (0, 1, 2, 4):
            mix = [(domain, 1.0) for domain in domains[:count]]
            runs[f"engine, {count} domains, batch {batch}"] = partial(engine_speed, engine, batch, tokens, mix)
    speeds = interleave(runs, rounds)
    loads = {
        "cold load": lambda: load_seconds(registry, entries[0], base, cold=True),
        "warm load": lambda: load_seconds(registry, entries[0], base, cold=False),
    }
    first_token = router_share(engine, registry, rounds)
    result = {
        "device": str(base.device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "base": base.model_id,
        "base_format": base.base_format,
        "dtype": str(base.dtype),
        "new_tokens": tokens,
        "rounds": rounds,
        "stack": {"experts": domains[0].stacks[0].num_experts, "rank": domains[0].stacks[0].rank},
        "resident_bytes_per_domain": domains[0].num_bytes,
        "file_bytes_per_domain": sum(stack.bytes for stack in entries[0].stacks),
        "decode_tokens_per_second": speeds,
        "load_seconds": interleave(loads, rounds),
        "time_to_first_token": first_token,
    }
    engine.stop()
    return result


def interleave(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, least and most of each run over the rounds, after one round that does not count."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            value = run()
            if round_number:
                values[name].append(value)
    return {n: {"median": statistics.median(v), "min": min(v), "max": max(v)} for n, v in values.items()}


def generate_speed(base: Any, batch: int, tokens: int) -> float:
    """Decode tokens per second of transformers' own loop; the first token, the prefill's, does not count."""
    import torch

    ids = torch.arange(100, 100 + PROMPT_TOKENS).repeat(batch, 1)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 2}
    seconds = []
    for count in (1, 1 + tokens):
        started = time.perf_counter()
        base.model.generate(**arguments, min_new_tokens=count, max_new_tokens=count)
        seconds.append(time.perf_counter() - started)
    return batch * tokens / (seconds[1] - seconds[0])


def engine_speed(engine: Any, batch: int, tokens: int, mix: Sequence[tuple[Any, float]]) -> float:
    """Decode tokens per second of all rows together; the first token, the prefill's, does not count."""
    from engine.types import SamplingParams
    from tests.engines import Client, collect

    client = Client(engine)
    sampling = SamplingParams(max_tokens=1 + tokens, temperature=0.0, ignore_eos=True)
    prompt = range(100, 100 + PROMPT_TOKENS)
    gate = threading.Event()
    engine.run_on_device(gate.wait)  # holds the engine, so that all prompts go through it in one step
    queues = [client.submit(prompt, sampling, mix)[1] for _ in range(batch)]
    gate.set()
    finished = [collect(queue).finished for queue in queues]
    return batch * tokens / max(event.seconds["decode"] for event in finished if event is not None)


def load_seconds(registry: Any, entry: Any, base: Any, *, cold: bool) -> float:
    """Reads, checks and prepares one domain; cold: its files are not in the system's page cache."""
    from engine.slots import load_domain

    if cold:
        for stack in entry.stacks:
            with registry.stack_path(stack).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    load_domain(registry, entry, dtype=base.dtype, device=base.device)
    return time.perf_counter() - started


def router_share(engine: Any, registry: Any, rounds: int) -> dict[str, float]:
    """Medians of what routing a text of 256 tokens takes, of its pass through the base alone, and of its prefill.

    `network_share` is the router's own part, beyond the base's pass, of the time to the first token.
    """
    from engine.model.hidden import hidden_states
    from engine.types import SamplingParams
    from router.checkpoint import RouterCheckpoint
    from router.router import Router
    from tests.engines import Client, collect

    base = engine.base
    path = registry.router_path()
    assert path is not None
    checkpoint = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
    text_ids = base.tokenizer(QUESTION * 20, add_special_tokens=False)["input_ids"][: checkpoint.settings.max_tokens]
    text = base.tokenizer.decode(text_ids)
    passes: list[float] = []

    def timed_pass(ids: Sequence[int]) -> Any:
        started = time.perf_counter()
        states = hidden_states(base, ids, checkpoint.settings.mid_layer)
        passes.append(time.perf_counter() - started)
        return states

    router = Router.from_checkpoint(checkpoint, tokenizer=base.tokenizer, hidden_states=timed_pass)
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    routing, prefill = [], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        engine.run_on_device(lambda: router.route(text)).result()
        routing.append(time.perf_counter() - started)
        events = Client(engine).submit(prompt, SamplingParams(max_tokens=1, temperature=0.0))[1]
        finished = collect(events).finished
        assert finished is not None
        prefill.append(finished.seconds["prefill"])
    route, base_pass, first = (statistics.median(values[1:]) for values in (routing, passes, prefill))
    return {
        "text_tokens": len(text_ids),
        "route_seconds": route,
        "base_pass_seconds": base_pass,
        "prefill_seconds": first,
        "router_share": route / (route + first),
        "network_share": (route - base_pass) / (route + first),
    }


def processor_name() -> str:
    """As the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(result: dict[str, Any]) -> None:
    """The medians, each with its spread, and its ratio to the base alone at the same batch."""
    print(result["base"], result["base_format"], result["dtype"], result["processor"], f"{result['threads']} threads")
    print(f"{'decode tokens/s':44} {'median':>8} {'min':>8} {'max':>8} {'of base':>8}")
    for name, value in result["decode_tokens_per_second"].items():
        alone = result["decode_tokens_per_second"][f"engine, 0 domains, batch {name.rpartition(' ')[2]}"]["median"]
        spread = f"{value['median']:8.1f} {value['min']:8.1f} {value['max']:8.1f}"
        print(f"{name:44} {spread} {value['median'] / alone:8.2f}")
    for name, value in result["load_seconds"].items():
        print(f"{name + ', seconds':44} {value['median']:8.3f} {value['min']:8.3f} {value['max']:8.3f}")
    first = result["time_to_first_token"]
    print(f"a text of {first['text_tokens']} tokens: route {first['route_seconds']:.3f} s", end=", ")
    print(f"of it the base's pass {first['base_pass_seconds']:.3f} s; prefill {first['prefill_seconds']:.3f} s")
    print(f"of the time to the first token: routing {first['router_share']:.2f}", end=", ")
    print(f"without the base's pass {first['network_share']:.3f}")


if __name__ == "__main__":
    main()
