"""Runs the server under load and tells which promises it broke: many streams, vanishing clients, nonsense, SIGTERM.

    python -m tests.benchmarks.load [--clients 200] [--seconds 600] [--json FILE]

Starts `brainstacks serve` with the real base and the demo store. First the idle server answers every case; then all
clients ask at once, and of their requests a tenth hang up at a random point and a tenth are bad. Every finished stream
must be its reference: text, mix, token counts, finish reason. Then all ask again, for longer answers, and SIGTERM comes
in the middle. Prints one line of JSON; its `failures` must be empty.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.event_streams import CHAT
from tests.benchmarks.load_answers import Case
from tests.benchmarks.load_cases import good_requests
from tests.benchmarks.load_clients import Plan
from tests.benchmarks.process_watch import held_by, watching
from tests.e2e.server_process import ServerProcess
from tests.servers import wait_until

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
LEAVING_TOKENS = (8, 64, 128)  # some end in the time that SIGTERM leaves them, some don't


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    clients: int = 200
    seconds: float = 600.0
    cases: int = 96
    leaving_cases: int = 16
    batch_rows: int = 16
    max_queue: int = 256
    drain_seconds: float = 6.0
    seed: int = 7


def main() -> None:
    """Runs it, prints, and exits with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="The server under load.")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--leaving-cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = Sizes(
        clients=given.clients,
        seconds=given.seconds,
        max_queue=given.max_queue,
        cases=given.cases,
        leaving_cases=given.leaving_cases,
        seed=given.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_load(Path(folder), sizes)
    print(json.dumps(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["failures"] else 0)


def run_load(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """What happened, and under `failures` every promise that was broken."""
    shutil.copytree(DEMO_STORE, folder / "store")
    settings = {
        "engine__max_batch_rows": sizes.batch_rows,
        "server__max_queue": sizes.max_queue,
        "server__drain_seconds": sizes.drain_seconds,
    }
    with ServerProcess(folder / "store", folder / "log", **settings) as server, _client_process() as clients:
        cases = [_reference(server, request) for request in good_requests(sizes.cases, seed=sizes.seed)]
        long_requests = good_requests(sizes.leaving_cases, seed=sizes.seed, tokens=LEAVING_TOKENS)
        leaving_cases = [_reference(server, request) for request in long_requests]
        before = _Counts.of(server)
        plan = Plan(server.port, server.model, sizes.clients, sizes.seconds, sizes.seed, cases)
        with watching(server) as watch:
            load = clients.run(plan)
        failures = [*load.pop("failures"), *_wait_for_rest(server), *_check_counts(before, _Counts.of(server), load)]
        failures += watch.faults(sizes.seconds)
        idle = held_by(server.pid)
        leaving = clients.run(
            Plan(server.port, server.model, sizes.clients, 0.0, sizes.seed, leaving_cases, leaving=True),
            when_begun=server.terminate,
        )
        status = server.wait()
        failures += leaving.pop("failures")
        if status != 0:
            failures.append(f"exit status {status} after SIGTERM")
        if leaving["finished"] + leaving["told"] != sizes.clients + leaving["late"].get("200", 0):
            failures.append(f"not every request was finished or told: {leaving}")
        if "Traceback" in server.log_text:
            failures.append("a traceback in the log: " + server.log_text.partition("Traceback")[2][-2000:])
        return {
            "sizes": asdict(sizes),
            "load": load | {"tokens_per_second": round(load["tokens"] / load["seconds"], 1)},
            "process": watch.summary() | {"idle_after": asdict(idle)},
            "leaving": {name: leaving[name] for name in ("finished", "told", "late", "seconds")} | {"status": status},
            "failures": failures,
        }


def _reference(server: ServerProcess, request: dict[str, Any]) -> Case:
    """The idle server's answer, whole: another path through the server than a stream's."""
    answer = server.http.post(CHAT, json=request).raise_for_status().json()
    choice, usage = answer["choices"][0], answer["usage"]
    return Case(
        request,
        text=choice["message"]["content"],
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        mix=answer["brainstacks"]["mix"],
    )


class _ClientProcess:
    """Runs plans in another process, one after the other."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, plan: Plan, *, when_begun: Any = None) -> dict[str, Any]:
        """The tally, and how long it took."""
        began = time.monotonic()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(plan)) + "\n")
        self._process.stdin.flush()
        while (tally := json.loads(self._process.stdout.readline())) == "begun":
            when_begun()
        return tally | {"seconds": round(time.monotonic() - began, 1)}


@contextmanager
def _client_process() -> Iterator[_ClientProcess]:
    command = [sys.executable, "-m", "tests.benchmarks.load_clients"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield _ClientProcess(process)
        process.communicate()  # closes its input, which ends it


@dataclass(frozen=True, slots=True)
class _Counts:
    """What the server has counted."""

    ok: float
    bad: dict[str, float]
    failed: float
    tokens: float

    @classmethod
    def of(cls, server: ServerProcess) -> "_Counts":
        def requests(status: str) -> float:
            return server.metric("brainstacks_requests_total", endpoint=CHAT, status=status)

        failed = sum(requests(str(status)) for status in (500, 502, 503, 504))
        bad = {status: requests(status) for status in ("400", "404", "429")}
        return cls(requests("200"), bad, failed, server.metric("brainstacks_completion_tokens_total"))


def _check_counts(before: _Counts, after: _Counts, load: dict[str, Any]) -> Iterator[str]:
    """The server's counts are the clients', but for the clients that left before they knew."""
    hung_up = sum(load["hung_up"].values())
    ok = after.ok - before.ok
    if not load["finished"] <= ok <= load["finished"] + hung_up:
        yield f"{ok} requests counted as answered, {load['finished']} streams finished, {hung_up} clients hung up"
    for status, count in after.bad.items():
        counted, seen = count - before.bad[status], load["statuses"].get(status, 0)
        if not seen <= counted <= seen + hung_up:
            yield f"{counted} answers counted with status {status}, the clients saw {seen}"
    if after.failed != before.failed:
        yield f"{after.failed - before.failed} answers counted as 5xx"
    if after.tokens - before.tokens < load["tokens"]:
        yield f"{after.tokens - before.tokens} tokens counted, {load['tokens']} came"


def _wait_for_rest(server: ServerProcess) -> list[str]:
    """What is still held some seconds after the last client has gone."""
    gauges = ("brainstacks_requests_running", "brainstacks_requests_waiting", "brainstacks_kv_cache_used_ratio")

    def held() -> dict[str, float]:
        domains = server.admin("GET", "/admin/domains").json()["domains"]
        leases = {f"leases of {domain['name']}": float(domain["leases"]) for domain in domains}
        return {name: value for name, value in ({g: server.metric(g) for g in gauges} | leases).items() if value}

    try:
        wait_until(lambda: not held(), what="everything is given back")
    except AssertionError:
        return [f"still held at the end: {held()}"]
    return []


if __name__ == "__main__":
    main()
