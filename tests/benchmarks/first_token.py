"""Measures what comes before the first token: loading a domain of the demo store, and routing a text of 256 tokens.

python -m tests.benchmarks.first_token [--rounds N] [--threads N]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
QUESTION = "A farmer has 17 sheep and buys 5 more every month. How many sheep does he have after one year and a half? "


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="What comes before the first token.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    print(json.dumps(measure(arguments.rounds), indent=1))


def measure(rounds: int) -> dict[str, Any]:
    """Medians in seconds, and shares."""
    from engine.engine import Engine
    from engine.model.base import load_base
    from stack_store.registry import StackRegistry

    base = load_base()
    registry = StackRegistry.open(DEMO_STORE, base_fingerprint=base.fingerprint, geometry=base.geometry)
    entry = registry.manifest.domains[0]
    engine = Engine(base, max_batch_rows=4, max_model_len=1024, kv_cache_tokens=4096)
    engine.start()
    loads: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for cold, seconds in loads.items():
            seconds.append(load_seconds(registry, entry, base, cold=cold))
    result = {
        "load_seconds": {"cold": statistics.median(loads[True]), "warm": statistics.median(loads[False])},
        "file_bytes_per_domain": sum(stack.bytes for stack in entry.stacks),
        "time_to_first_token": router_share(engine, registry, rounds),
        "base_format": base.base_format,
        "dtype": str(base.dtype),
    }
    engine.stop()
    return result


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
    from engine.types import SamplingParams
    from router.checkpoint import RouterCheckpoint
    from router.router import Router
    from tests.engines import Client, collect

    base = engine.base
    path = registry.router_path()
    assert path is not None
    checkpoint = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
    passes: list[float] = []

    def timed_pass(ids: Sequence[int]) -> Any:
        started = time.perf_counter()
        states = engine.read(ids, checkpoint.settings.mid_layer).result()
        passes.append(time.perf_counter() - started)
        return states

    router = Router.from_checkpoint(checkpoint, tokenizer=base.tokenizer, hidden_states=timed_pass)
    routing, prefill = [], []
    for number in range(rounds + 1):
        # Another beginning each time, or the engine would know the prompt.
        text = f"{number} {number + 1} {QUESTION * 20}"
        text_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"][: checkpoint.settings.max_tokens]
        text = base.tokenizer.decode(text_ids)
        messages = [{"role": "system", "content": f"{number}"}, {"role": "user", "content": text}]
        prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        started = time.perf_counter()
        router.route(text)
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


if __name__ == "__main__":
    main()
