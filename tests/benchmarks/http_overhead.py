"""Measures what HTTP adds to the engine: throughput of 16 users, and the first byte of a known route and prefix.

    python -m tests.benchmarks.http_overhead [--rounds N] [--tokens N] [--users N]

One process has the server with the real base and the demo store, as `brainstacks serve` puts them together; another has
the clients. The very requests that HTTP submitted are then submitted straight to the same engine, both in turn, round
by round. The clients share the cores with the server, which an engine without clients need not: what they take is told.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
SUBJECTS = ("the sea", "a fever", "prime numbers", "sorting a list", "old maps", "bread", "the moon", "taxes")
MIXES: dict[str, dict[str, Any]] = {
    "base": {"brainstacks": {"mode": "base"}},
    "routed": {},
}
FIRST_BYTE_QUESTION = "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?"


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="What HTTP costs over the engine.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--first-bytes", type=int, default=60)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    from server.threads import apply_thread_plan, thread_plan

    apply_thread_plan(thread_plan(os.cpu_count() or 1), os.environ, is_override=False)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every number, by name."""
    import torch

    from server.compose import compose_app
    from server.config import load_settings
    from tests.benchmarks.decode import processor_name
    from tests.benchmarks.stream_clients import client_process
    from tests.servers import run_app_in_thread

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEMO_STORE, Path(folder) / "store")
        settings = load_settings(
            flags={
                "store": {"path": Path(folder) / "store"},
                "engine": {"max_batch_rows": arguments.users, "dtype": arguments.dtype},
            }
        )
        app = compose_app(settings)
        engine = app.state.service.engine
        with (
            run_app_in_thread(app, settings.server) as (_, url),
            client_process(int(url.rpartition(":")[2])) as clients,
        ):
            throughput = {name: throughputs(engine, clients, arguments, extra) for name, extra in MIXES.items()}
            first = first_bytes(engine, clients, arguments.first_bytes)
        return {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__},
            "base": engine.base.model_id,
            "dtype": str(engine.base.dtype),
            "users": arguments.users,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "throughput": throughput,
            "first_byte": first,
        }


def throughputs(engine: Any, clients: Any, arguments: argparse.Namespace, extra: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds in tokens per second of all users, from the first request to the end of the last."""
    texts = [f"Tell me about {SUBJECTS[user % len(SUBJECTS)]}, part {user}." for user in range(arguments.users)]
    bodies = [question(text, arguments.tokens) | extra for text in texts]
    with recorded(engine) as requests:
        clients.stream(bodies)
    submit_all(engine, requests)
    through_http, straight, loop_seconds, client_seconds = [], [], [], []
    for number in range(arguments.rounds):
        if number % 2:  # whoever is first in a round must not always be the same
            straight.append(arguments.tokens * len(requests) / submit_all(engine, requests)[1])
        loop_began = loop_cpu_seconds()
        streamed = clients.stream(bodies)
        loop_seconds.append((loop_cpu_seconds() - loop_began) / streamed.completion_tokens)
        client_seconds.append(streamed.cpu_seconds / streamed.completion_tokens)
        through_http.append(streamed.completion_tokens / streamed.seconds)
        if not number % 2:
            straight.append(arguments.tokens * len(requests) / submit_all(engine, requests)[1])
    ratios = [http / alone for http, alone in zip(through_http, straight, strict=True)]
    result = {
        "http_tokens_per_second": round(statistics.median(through_http), 1),
        "engine_tokens_per_second": round(statistics.median(straight), 1),
        "overhead": round(1 - statistics.median(through_http) / statistics.median(straight), 4),
        "overhead_of_the_best": round(1 - max(through_http) / max(straight), 4),
        "median_overhead_of_a_round": round(1 - statistics.median(ratios), 4),
        "overhead_by_round": [round(1 - ratio, 3) for ratio in ratios],
        "event_loop_us_per_token": round(1e6 * statistics.median(loop_seconds), 1),
        "client_us_per_token": round(1e6 * statistics.median(client_seconds), 1),
    }
    print(extra, result, file=sys.stderr)
    return result


def loop_cpu_seconds() -> float:
    """What the server's event loop has computed so far."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "uvicorn")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def first_bytes(engine: Any, clients: Any, count: int) -> dict[str, float]:
    """Milliseconds to the first content of a prompt whose route and prefix are known, through HTTP and straight."""
    body = question(FIRST_BYTE_QUESTION, 2)
    clients.stream([body])
    with recorded(engine) as requests:
        clients.stream([body])
    through_http, straight = [], []
    for _ in range(count):
        through_http.append(1000 * clients.stream([body]).first_content_seconds[0])
        straight.append(1000 * submit_all(engine, requests)[0])
    middle = statistics.median(straight)
    return {
        "engine_median_ms": round(middle, 2),
        "engine_p95_ms": round(percentile(straight, 0.95), 2),
        "http_median_ms": round(statistics.median(through_http), 2),
        "http_p95_ms": round(percentile(through_http, 0.95), 2),
        "added_median_ms": round(statistics.median(through_http) - middle, 2),
        "added_p95_ms": round(percentile([value - middle for value in through_http], 0.95), 2),
    }


def question(text: str, tokens: int) -> dict[str, Any]:
    """A streamed chat of so many tokens."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def recorded(engine: Any) -> Iterator[list[Any]]:
    """The requests that are submitted within the block."""
    requests: list[Any] = []
    submit = engine.submit

    def record(request: Any, on_event: Any) -> None:
        requests.append(request)
        submit(request, on_event)

    engine.submit = record
    try:
        yield requests
    finally:
        del engine.submit


def submit_all(engine: Any, requests: Sequence[Any]) -> tuple[float, float]:
    """Seconds to the first token of any request and to the end of the last."""
    from engine.types import FailedEvent, FinishedEvent, TokensEvent

    firsts: list[float] = []
    unfinished = len(requests)
    done = threading.Event()

    def on_event(event: Any) -> None:
        nonlocal unfinished
        if isinstance(event, TokensEvent) and not firsts:
            firsts.append(time.perf_counter())
        elif isinstance(event, FinishedEvent | FailedEvent):
            unfinished -= 1
            if unfinished == 0:
                done.set()

    began = time.perf_counter()
    for number, request in enumerate(requests):
        engine.submit(replace(request, request_id=f"straight-{number}"), on_event)
    if not done.wait(300):
        raise TimeoutError("the engine did not answer")
    return firsts[0] - began, time.perf_counter() - began


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many of the values don't exceed."""
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
