"""Measures what others do to a running stream: time per token over HTTP, alone, beside loads and beside long prompts.

    python -m tests.benchmarks.stalls [--tokens N] [--rounds N] [--loads-per-second N]

Starts a server with the demo store and room for two domains. A second client asks for one token again and again: of a
domain that is resident, or of four in turn, so that each of its requests waits for a load. The cases are taken in turn,
round by round.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

from tests.e2e.server_process import ServerProcess

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
LONG_PROMPT = 2000
OTHERS = ("chat", "code", "medical", "reasoning")


def main() -> None:
    """Starts the server, measures, prints."""
    parser = argparse.ArgumentParser(description="Time per token of a stream beside loads and prompts.")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads-per-second", type=float, default=10.0)
    arguments = parser.parse_args()
    manifest = json.loads((DEMO_STORE / "manifest.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        shutil.copytree(DEMO_STORE, store)
        # A resident domain takes at most four bytes where its int8 file takes one.
        budget = 8 * max(stack["bytes"] for domain in manifest["domains"] for stack in domain["stacks"])
        with ServerProcess(
            store, Path(folder) / "log", store__device_budget_bytes=budget, engine__dtype="auto"
        ) as server:
            result = measure(server, arguments.tokens, arguments.rounds, arguments.loads_per_second)
    for name, values in result.items():
        figures = "  ".join(f"{figure} {values[figure]:6.1f} ms" for figure in ("mean", "median", "p99"))
        print(f"{name:26} {figures}  loads {values['loads']:.0f}")
    print(json.dumps(result))


def measure(server: ServerProcess, tokens: int, rounds: int, loads_per_second: float) -> dict[str, dict[str, float]]:
    """Milliseconds per token of each case, by name."""
    model = server.model
    for domain in (*OTHERS, "math"):
        token_gaps(server, f"{model}:{domain}", 8)  # warms up: the first load of a file hashes it
    beside: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "alone": nullcontext,
        "beside hits": partial(asking, server, ("math",), loads_per_second),
        "beside loads": partial(asking, server, OTHERS, loads_per_second),
        "beside long prompts": partial(prompting, server),
    }
    gaps: dict[str, list[float]] = {}
    loads: Counter[str] = Counter()
    for _ in range(rounds):
        for mix in ("base", "math"):
            for case, others in beside.items():
                before = loads_so_far(server)
                with others():
                    gaps.setdefault(f"{mix}, {case}", []).extend(token_gaps(server, f"{model}:{mix}", tokens))
                loads[f"{mix}, {case}"] += int(loads_so_far(server) - before)
    return {name: summary(values) | {"loads": loads[name]} for name, values in gaps.items()}


def summary(gaps: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in milliseconds."""
    ordered = sorted(gaps)
    return {
        "mean": 1000 * statistics.mean(ordered),
        "median": 1000 * statistics.median(ordered),
        "p99": 1000 * ordered[int(0.99 * (len(ordered) - 1))],
    }


def loads_so_far(server: ServerProcess) -> float:
    """Loads that the server has made."""
    return server.metric("brainstacks_stack_load_seconds_count")


def token_gaps(server: ServerProcess, model: str, tokens: int) -> list[float]:
    """Seconds between the pieces of one streamed answer."""
    times = []
    for chunk in server.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times)]


@contextmanager
def prompting(server: ServerProcess) -> Iterator[None]:
    """Has one prompt of LONG_PROMPT tokens after the other read while the block runs."""
    done = threading.Event()

    def ask() -> None:
        number = 0
        while not done.is_set():
            number += 1  # no two prompts are the same
            server.openai.completions.create(
                model=f"{server.model}:base", prompt=[100 + number, *range(200, 199 + LONG_PROMPT)], max_tokens=1
            )

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def asking(server: ServerProcess, domains: tuple[str, ...], per_second: float) -> Iterator[None]:
    """Has another client ask one domain after the other for one token while the block runs."""
    done = threading.Event()

    def ask() -> None:
        turn = 0
        while not done.wait(1 / per_second):
            model = f"{server.model}:{domains[turn % len(domains)]}"
            server.openai.completions.create(model=model, prompt="Hi", max_tokens=1)
            turn += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
