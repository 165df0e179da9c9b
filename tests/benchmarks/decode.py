"""Measures what a mix costs: decode speed and prefill of the base and of mixes, and of their peers.

    python -m tests.benchmarks.decode [--rounds N] [--tokens N] [--threads N] [--json FILE]

Everything is measured in one process, the settings interleaved round by round, and printed as a table of medians with
their spread, and as JSON into a file. Stacks have the paper's size (4 experts of rank 16, 2 active) and random weights.
The peers run on the same NF4 values: transformers' `generate`, PEFT's mixed batch with adapters of as many parameters,
and the paper's layer.
"""

import argparse
import itertools
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

ROWS = (1, 8, 16)
DOMAINS = (0, 1, 2, 4, 10)
PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 512
PAPER_STACKS = 4
PAPER_TOKENS = 8  # it is slow

PROMPT_NUMBERS = itertools.count()

Mix = Sequence[tuple[Any, float]]


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="Decode speed of the base and of mixes.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    result = measure(arguments.rounds, arguments.tokens)
    print_table(result)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Every number, by name; speeds in tokens per second, of all rows together."""
    import torch
    import transformers

    from engine.engine import Engine
    from engine.model.base import load_base
    from engine.model.moe_lora import MoeLoraConfig

    config = MoeLoraConfig()
    base = load_base()
    domains = [random_domain(base, config, seed) for seed in range(max(DOMAINS))]
    engine = Engine(base, max_batch_rows=max(ROWS), max_model_len=1024, kv_cache_tokens=65536)
    engine.start()
    speeds = interleave(runs(engine, domains, config, tokens), rounds)
    engine.stop()
    return {
        "device": str(base.device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "base": base.model_id,
        "base_format": base.base_format,
        "dtype": str(base.dtype),
        "new_tokens": tokens,
        "rounds": rounds,
        "stack": {"experts": config.num_experts, "rank": config.rank, "bytes": domains[0].num_bytes},
        "tokens_per_second": speeds,
    }


def runs(engine: Any, domains: list[Any], config: Any, tokens: int) -> dict[str, Callable[[], float]]:
    """What is measured, by name."""
    from engine.model.base import load_base
    from tests.benchmarks.peers import install_paper_layers, peft_model

    found: dict[str, Callable[[], float]] = {}
    peer = load_base(base_format="nf4")
    adapters = [f"domain-{number}" for number in range(4)]
    adapted = peft_model(load_base(base_format="nf4"), adapters=adapters, rank=config.num_experts * config.rank)
    paper = load_base(base_format="nf4-dense")
    install_paper_layers(paper, stacks=PAPER_STACKS, config=config)
    for rows in ROWS:
        found[f"transformers generate, base, {rows} rows"] = partial(generate_speed, peer.model, rows, tokens)
        for count in DOMAINS:
            mixes = [[(domain, 1.0) for domain in domains[:count]]] * rows
            found[f"engine, {count} domains, {rows} rows"] = partial(engine_speed, engine, tokens, mixes)
        routes = [mixed_route(domains[:4], row) for row in range(rows)]
        found[f"engine, mixed routes, {rows} rows"] = partial(engine_speed, engine, tokens, routes)
        alone: list[Mix] = [()] * rows
        for name, wanted in (("0 domains", alone), ("mixed routes", routes)):
            found[f"engine, {name}, behind {LONG_PROMPT_TOKENS} tokens, {rows} rows"] = partial(
                engine_speed, engine, tokens, wanted, LONG_PROMPT_TOKENS
            )
    names = [adapters[row % len(adapters)] for row in range(max(ROWS))]
    found[f"PEFT adapter_names, one adapter a row, {max(ROWS)} rows"] = partial(
        generate_speed, adapted, max(ROWS), tokens, adapter_names=names
    )
    found[f"the paper's layer, {PAPER_STACKS} stacks, 1 rows"] = partial(generate_speed, paper.model, 1, PAPER_TOKENS)
    for count in (0, 1):
        mix = [(domain, 1.0) for domain in domains[:count]]
        found[f"engine, prefill of {LONG_PROMPT_TOKENS}, {count} domains"] = partial(prefill_speed, engine, mix)
    found["engine, first token with a known prefix, of that without"] = partial(
        reuse_ratio, engine, mixed_route(domains[:4], 1)
    )
    found[f"transformers, prefill of {LONG_PROMPT_TOKENS}, base"] = partial(peer_prefill_speed, peer.model)
    return found


def random_domain(base: Any, config: Any, seed: int) -> Any:
    """One stack of random weights, as a resident domain."""
    from engine.slots import ResidentDomain
    from tests.stacks import random_projections, to_serving

    projections = random_projections(base.geometry, config, seed=seed, size=0.01)
    stack = to_serving(base.geometry, config, projections, dtype=base.dtype, panelled=True)
    return ResidentDomain(f"domain-{seed}", str(seed), (stack,))


def mixed_route(domains: list[Any], row: int) -> Mix:
    """One or two domains, others for every row."""
    second = [(domains[(row + 1) % len(domains)], 0.5)] if row % 2 else []
    return [(domains[row % len(domains)], 1.0), *second]


def interleave(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, least and most of each run over the rounds, after one round that does not count."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            value = run()
            if round_number:
                values[name].append(value)
    return {n: {"median": statistics.median(v), "min": min(v), "max": max(v)} for n, v in values.items()}


def generate_speed(model: Any, rows: int, tokens: int, **arguments: Any) -> float:
    """Decode tokens per second of transformers' own loop; the first token, the prefill's, does not count."""
    import torch

    from tests.benchmarks.peers import generate_seconds

    prompts = torch.stack([torch.arange(100 + row, 100 + row + PROMPT_TOKENS) for row in range(rows)])
    return rows * tokens / generate_seconds(model, prompts, tokens, **arguments)[1]


def peer_prefill_speed(model: Any) -> float:
    """Prompt tokens per second of transformers' own code."""
    import torch

    from tests.benchmarks.peers import generate_seconds

    return LONG_PROMPT_TOKENS / generate_seconds(model, torch.arange(100, 100 + LONG_PROMPT_TOKENS)[None], 1)[0]


def engine_speed(engine: Any, tokens: int, mixes: Sequence[Mix], prompt_tokens: int = PROMPT_TOKENS) -> float:
    """Decode tokens per second of all rows together; the first token, the prefill's, does not count.

    After the first round the prompts are known, so that no step reads prompts beside those that decode.
    """
    from engine.types import SamplingParams
    from tests.engines import Client, collect

    client = Client(engine)
    sampling = SamplingParams(max_tokens=1 + tokens, temperature=0.0, ignore_eos=True)
    gate = threading.Event()
    engine.run_on_device(gate.wait)  # holds the engine, so that all prompts go through it together
    queues = [
        client.submit(range(100 + row, 100 + row + prompt_tokens), sampling, mix)[1] for row, mix in enumerate(mixes)
    ]
    gate.set()
    finished = [collect(queue).finished for queue in queues]
    return len(mixes) * tokens / max(event.seconds["decode"] for event in finished if event is not None)


def prefill_speed(engine: Any, mix: Mix) -> float:
    """Prompt tokens per second of one request alone, whose prompt begins like no other."""
    return LONG_PROMPT_TOKENS / first_token_seconds(engine, mix, new_prompt())


def reuse_ratio(engine: Any, mix: Mix) -> float:
    """Time to the first token of a prompt whose first 512 tokens were read before, of that without."""
    prompt = new_prompt()
    first = first_token_seconds(engine, mix, prompt)
    return first_token_seconds(engine, mix, [*prompt, 50]) / first


def new_prompt() -> list[int]:
    """LONG_PROMPT_TOKENS tokens, no two prompts with the same beginning."""
    start = next(PROMPT_NUMBERS)
    return [1000 + start, *range(100, 99 + LONG_PROMPT_TOKENS)]


def first_token_seconds(engine: Any, mix: Mix, prompt: Sequence[int]) -> float:
    """Seconds from the start of a request to its first token."""
    from engine.types import SamplingParams
    from tests.engines import Client, collect

    finished = collect(Client(engine).submit(prompt, SamplingParams(max_tokens=1, temperature=0.0), mix)[1]).finished
    assert finished is not None
    return finished.seconds["prefill"]


def processor_name() -> str:
    """As the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(result: dict[str, Any]) -> None:
    """The medians, each with its spread, and its ratio to the engine's base alone with as many rows."""
    print(result["base"], result["base_format"], result["dtype"], result["processor"], f"{result['threads']} threads")
    speeds = result["tokens_per_second"]
    print(f"{'tokens/s':56} {'median':>8} {'min':>8} {'max':>8} {'of base':>8}")
    for name, value in speeds.items():
        if "known prefix" in name:
            print(f"{name:56} {value['median']:8.3f} {value['min']:8.3f} {value['max']:8.3f}")
            continue
        rows = name.rpartition(", ")[2]
        alone = f"engine, 0 domains, {rows}"
        if "behind" in name:
            alone = f"engine, 0 domains, behind {LONG_PROMPT_TOKENS} tokens, {rows}"
        if "prefill" in name:
            alone = f"engine, prefill of {LONG_PROMPT_TOKENS}, 0 domains"
        spread = f"{value['median']:8.1f} {value['min']:8.1f} {value['max']:8.1f}"
        print(f"{name:56} {spread} {value['median'] / speeds[alone]['median']:8.2f}")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
