"""What a decode step reads, what it could take at the memory's speed, and where its time goes.

    python -m tests.benchmarks.roofline [--threads N]

The embedded base with stacks of the paper's size. The memory's speed is that of a sum over numbers that no cache holds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np

READ_BYTES = 2**28
REPEATS = 15
TOKENS = 40
PROMPT_TOKENS = 32
CASES = [(1, 0), (1, 1), (1, 4), (16, 0), (16, 1), (16, 4)]  # rows, domains


def main() -> None:
    """Settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="Roofline and profile of a decode step.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    print_table(*measure(arguments.threads))


def measure(threads: int) -> tuple[float, list[dict[str, float]]]:
    """Bytes a second of the memory; of each case milliseconds by part, and bytes."""
    from engine.engine import Engine
    from engine.model.base import load_base
    from engine.model.moe_lora import MoeLoraConfig
    from tests.benchmarks.decode import random_domain

    base = load_base()
    config = MoeLoraConfig()
    domains = [random_domain(base, config, seed) for seed in range(4)]
    engine = Engine(base, max_batch_rows=16, max_model_len=256, kv_cache_tokens=4096)
    engine.start()
    fused: Any = engine._runner._fused
    assert fused is not None, "this machine or base has no fused step"
    bandwidth = READ_BYTES / median_seconds(reader(threads))
    cases = []
    for rows, count in CASES:
        parts = seconds_by_part(engine, fused, rows, domains[:count])
        cases.append(
            {
                "rows": rows,
                "domains": count,
                "step": 1000 * parts["step"],
                "kernel": 1000 * parts["kernel"],
                "sampling": 1000 * parts["sampling"],
                "products": 1000 * median_seconds(products(fused, rows, threads)),
                "bytes": base_bytes(fused) + stack_bytes(base, config, count, rows),
            }
        )
    engine.stop()
    return bandwidth, cases


def reader(threads: int) -> Callable[[], Any]:
    """Sums READ_BYTES bytes with as many threads."""
    import numba
    from numba import njit, prange

    def read(numbers: Any, sums: Any) -> None:
        share = numbers.size // sums.size
        for thread in prange(sums.size):
            sums[thread] = numbers[thread * share : (thread + 1) * share].sum()

    numba.set_num_threads(threads)
    compiled = njit(parallel=True, fastmath=True)(read)
    numbers, sums = np.ones(READ_BYTES // 8), np.zeros(threads)
    return lambda: compiled(numbers, sums)


def products(fused: Any, rows: int, threads: int) -> Callable[[], Any]:
    """The products of a step without stacks, and nothing else."""
    from numba import njit, prange

    from engine.model.fused_kernels import _product, _share

    def run(weights: Any, head: Any, inputs: Any, out: Any) -> None:
        for thread in prange(threads):
            for layer in range(weights[0].shape[0]):
                for group in range(4):
                    first, last = _share(thread, threads, weights[group].shape[1])
                    _product(weights[group][layer], first, last, inputs[group], out)
            first, last = _share(thread, threads, head.shape[0])
            _product(head, first, last, inputs[0], out)

    weights, head = tuple(fused._decoder[i] for i in (0, 2, 4, 6)), fused._decoder[11]
    inputs = tuple(np.zeros((rows, w.shape[2]), w.dtype) for w in weights)
    out = np.empty((rows, head.shape[0]), np.float32)
    compiled = njit(parallel=True)(run)
    return lambda: compiled(weights, head, inputs, out)


def seconds_by_part(engine: Any, fused: Any, rows: int, domains: list[Any]) -> dict[str, float]:
    """Medians over the steps that decode all `rows` sequences: the whole step, the compiled function, sampling."""
    import engine.engine as engine_module
    from tests.benchmarks.decode import engine_speed

    kernels: list[Call] = []
    samples: list[Call] = []
    mixes = [[(domain, 1.0) for domain in domains]] * rows
    with timed(fused, "run", kernels), timed(engine_module, "sample", samples):
        engine_speed(engine, TOKENS + 4 * rows, mixes)  # prompts are read beside sequences that decode already
    full = [call for call in kernels if [len(row.token_ids) for row in call.arguments[0]] == [1] * rows]
    return {
        "step": statistics.median(later.began - earlier.began for earlier, later in pairwise(full)),
        "kernel": statistics.median(call.ended - call.began for call in full),
        "sampling": statistics.median(call.ended - call.began for call in samples if len(call.arguments[1]) == rows),
    }


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function that is timed."""

    arguments: tuple[Any, ...]
    began: float
    ended: float


@contextmanager
def timed(owner: Any, name: str, calls: list[Call]) -> Iterator[None]:
    """Notes each call of a function while the block runs."""
    call = getattr(owner, name)

    def run(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        calls.append(Call(arguments, began, time.perf_counter()))
        return result

    with patch.object(owner, name, run):
        yield


def base_bytes(fused: Any) -> float:
    """Of all weights that a step of any size reads once."""
    return float(sum(fused._decoder[i].nbytes for i in (0, 2, 4, 6, 11)))


def stack_bytes(base: Any, config: Any, domains: int, rows: int) -> float:
    """Of the gates and chosen experts that a step reads: one row's are known, many rows choose all of them."""
    experts = config.top_k if rows == 1 else config.num_experts
    a_rows, b_rows = experts * config.rank + config.num_experts, experts * config.rank
    shapes = base.geometry.shapes.values()
    numbers = sum(a_rows * inputs + b_rows * outputs for inputs, outputs in shapes) * base.num_layers
    return float(2 * domains * numbers)


def median_seconds(run: Callable[[], Any]) -> float:
    """Median time of a call, after one that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def print_table(bandwidth: float, cases: list[dict[str, float]]) -> None:
    """Milliseconds a step, each part's share of it, and how near the step is to the memory's speed."""
    print(f"memory {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'rows':>4} {'domains':>7} {'step ms':>8} {'products':>9} {'other kernel':>12} {'sampling':>9} {'Python':>7}",
        end=" ",
    )
    print(f"{'MB read':>8} {'ideal ms':>8} {'of ideal':>8}")
    for case in cases:
        step, kernel = case["step"], case["kernel"]
        python = step - kernel - case["sampling"]
        ideal = 1000 * case["bytes"] / bandwidth
        shares = [case["products"] / step, (kernel - case["products"]) / step, case["sampling"] / step, python / step]
        print(f"{case['rows']:4.0f} {case['domains']:7.0f} {step:8.2f}", end=" ")
        print(f"{shares[0]:9.0%} {shares[1]:12.0%} {shares[2]:9.0%} {shares[3]:7.0%}", end=" ")
        print(f"{case['bytes'] / 1e6:8.0f} {ideal:8.2f} {step / ideal:8.2f}")


if __name__ == "__main__":
    main()
