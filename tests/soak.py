"""Mixed traffic on a running server for as long as one likes, while its store changes and faults are injected.

    python -m tests.soak [--minutes N] [--seed N] [--json FILE]

Every answer is compared with the reference that the same server gave to the same question when nothing else ran: for
the version of the domain that answered, bit for bit. At the end nothing may be left: no lease, block, file or thread.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from stack_store.format import read_stack, write_stack
from stack_store.registry import StackRegistry
from tests.e2e.server_process import ADMIN_KEY, ServerProcess

DEMO_STORE = Path(__file__).parents[1] / "demo" / "store"
NUM_CLIENTS = 8
TOKENS = 12
SAMPLE_SECONDS = 5.0
SHORT_SECONDS = 120.0  # in shorter runs not everything need happen
FAILURE_SECONDS = 5.0  # for which a load that failed is remembered
WARM_UP_SHARE = 1 / 3  # of the time, after which memory may not grow any more
STABLE = ("chat", "code", "medical", "reasoning")  # never change
CHANGING = ("law", "math", "physics")  # are replaced, deleted, damaged
QUESTIONS = (
    "What is anemia?",
    "A box holds 12 eggs. How many eggs are in 7 boxes?",
    "Write a function that adds two numbers.",
    "Why is the sky blue?",
)
Mix = dict[str, float]
Answer = tuple[str, tuple[float, ...]]  # text and log probabilities


@dataclass(frozen=True, slots=True)
class Asked:
    """What every domain is asked, and with what weight."""

    questions: Sequence[str] = QUESTIONS
    weights: Sequence[float] = (0.5, 1.0)


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[float, str]] = field(default_factory=list)  # seconds, and for which domain
    samples: list[dict[str, float]] = field(default_factory=list)


class Spells:
    """Of each domain whether something is so at present, and how often that began."""

    def __init__(self) -> None:
        self._lasting: set[str] = set()
        self._begun: Counter[str] = Counter()

    def begin(self, domain: str) -> None:
        """Before it can be so."""
        self._lasting.add(domain)
        self._begun[domain] += 1

    def end(self, domain: str) -> None:
        """After it can be so no more."""
        self._lasting.discard(domain)

    def watch(self, domain: str) -> Callable[[], bool]:
        """Tells whether it was so at any time from now until that is asked."""
        was, begun = domain in self._lasting, self._begun[domain]
        return lambda: was or self._begun[domain] != begun


class Soak:
    """One server and all that is done to it."""

    def __init__(self, server: ServerProcess, folder: Path, asked: Asked, *, seconds: float, seed: int) -> None:
        self._server = server
        self._folder = folder
        self._seconds = seconds
        self._asked = asked
        self._draw = random.Random(seed)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=64))
        self._admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        self._references: dict[tuple[str, str, str, float], Answer] = {}
        self._versions: dict[str, list[Path]] = {}
        self._now: dict[str, set[int]] = {}  # of a changing domain, the versions that may answer at present
        self._changing = {domain: asyncio.Lock() for domain in CHANGING}  # a domain is changed, or damaged
        self._absent = Spells()  # not registered
        self._broken = Spells()  # a file is damaged, or was a moment ago
        self.tally = Tally()

    async def run(self) -> None:
        """All of it."""
        self._write_versions()
        await self._learn_references()
        before = self._sample()
        ends = time.monotonic() + self._seconds
        tasks: list[Coroutine[Any, Any, None]] = [self._client(ends) for _ in range(NUM_CLIENTS)]
        tasks += [self._hang_up(ends), self._change(ends), self._damage(ends), self._watch(ends)]
        await asyncio.gather(*tasks)
        await self._settle()
        self.tally.samples.append(self._sample())
        self._require_nothing_left(before)
        if self._seconds >= SHORT_SECONDS:
            self._require_everything_happened()
        await self._http.aclose()

    def _write_versions(self) -> None:
        """Three versions of each changing domain: first rounds of other domains under its name."""
        registry = StackRegistry.open(DEMO_STORE)
        for index, domain in enumerate(CHANGING):
            self._versions[domain] = []
            for number in range(3):
                source = registry.domain(STABLE[number])
                read = read_stack(registry.stack_path(source.stacks[0]))
                scale = read.header.scale * (0.5 + 0.25 * index)  # so that no domain answers as another does
                header = replace(read.header, domain=domain, round=1, weights="bf16", scale=scale)
                path = self._folder / "import" / f"{domain}-{number}.safetensors"
                path.parent.mkdir(exist_ok=True)
                write_stack(path, header, read.groups)
                self._versions[domain].append(path)
            self._now[domain] = set()
        registry.close()

    async def _learn_references(self) -> None:
        """What every domain, in every version, says to every question when nobody else asks."""
        for question in self._asked.questions:
            await self._learn("base", "", question, {})
            for domain in STABLE:
                for weight in self._asked.weights:
                    await self._learn(domain, "", question, {domain: weight})
        for number in range(3):
            for domain in CHANGING:
                await self._register(domain, number)
            for question in self._asked.questions:
                for domain in CHANGING:
                    for weight in self._asked.weights:
                        await self._learn(domain, str(number), question, {domain: weight})
        different = len(set(self._references.values()))
        assert different > len(self._references) * 0.8, f"{different} of {len(self._references)} answers differ"

    async def _learn(self, domain: str, version: str, question: str, mix: Mix) -> None:
        answers = [_answer_of(await self._ask(question, mix)) for _ in range(2)]
        assert answers[0] == answers[1], "an answer repeats itself before anything is blamed on the traffic"
        self._references[domain, version, question, next(iter(mix.values()), 0.0)] = answers[0]

    async def _ask(self, question: str, mix: Mix) -> httpx.Response:
        body = {
            "prompt": question,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "brainstacks": {"mix": mix} if mix else {"mode": "base"},
        }
        return await self._http.post("/v1/completions", json=body)

    async def _client(self, ends: float) -> None:
        while time.monotonic() < ends:
            domain = self._draw.choice((*STABLE, *CHANGING, "base"))
            question, weight = self._draw.choice(self._asked.questions), self._draw.choice(self._asked.weights)
            possible = self._now.get(domain, set()).copy()
            excuses = {"domain_not_found": self._absent.watch(domain), "load_failed": self._broken.watch(domain)}
            began = time.monotonic()
            watched: set[int] = set()
            if domain in CHANGING:
                watched = self._now[domain]
            response = await self._ask(question, {} if domain == "base" else {domain: weight})
            self.tally.waits.append((time.monotonic() - began, domain))
            if response.status_code == 200:
                self._judge(domain, question, weight, possible | watched, response)
            else:
                self._excuse(domain, response, excuses)

    def _excuse(self, domain: str, response: httpx.Response, excuses: Mapping[str, Callable[[], bool]]) -> None:
        code = response.json()["error"]["code"]
        self.tally.counts[f"{response.status_code} {code}"] += 1
        is_excused = code in excuses and excuses[code]()
        assert is_excused, f"{domain}: {response.status_code} {response.text}"

    def _judge(self, domain: str, question: str, weight: float, versions: set[int], response: httpx.Response) -> None:
        answer = _answer_of(response)
        names = [""] if domain not in CHANGING else [str(number) for number in range(3)]
        weight = 0.0 if domain == "base" else weight
        expected = {name: self._references[domain, name, question, weight] for name in names}
        matching = [name for name, reference in expected.items() if reference == answer]
        assert matching, f"{domain} at {weight} answered {question!r} with {answer}, not with one of {expected}"
        if domain in CHANGING:
            assert {int(name) for name in matching} & (versions | self._now[domain]), (
                f"{domain} answered as version {matching}, registered were {versions}"
            )
        self.tally.counts["right answers"] += 1
        self.tally.counts[f"right answers of {domain}"] += 1

    async def _hang_up(self, ends: float) -> None:
        """Streams whose clients leave after a random while."""
        while time.monotonic() < ends:
            domain = self._draw.choice(STABLE)
            body = {
                "messages": [{"role": "user", "content": self._draw.choice(self._asked.questions)}],
                "max_tokens": 200,
                "stream": True,
                "ignore_eos": True,
                "brainstacks": {"mix": {domain: 1.0}},
            }
            leaves_after = self._draw.uniform(0, 1.5)
            try:
                async with asyncio.timeout(leaves_after):
                    async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                        assert response.status_code == 200, await response.aread()
                        async for _ in response.aiter_raw():
                            pass
            except TimeoutError:
                self.tally.counts["hang-ups"] += 1
            await asyncio.sleep(0.3)

    async def _change(self, ends: float) -> None:
        """Replaces, deletes, registers anew, pins, prefetches."""
        while time.monotonic() < ends:
            domain = self._draw.choice(CHANGING)
            act = self._draw.choice(("replace", "replace", "replace", "delete", "pin", "prefetch"))
            if not self._changing[domain].locked():
                async with self._changing[domain]:
                    await self._change_one(domain, act)
                self.tally.counts[act] += 1
            await asyncio.sleep(self._draw.uniform(0.1, 1.0))

    async def _change_one(self, domain: str, act: str) -> None:
        if act == "replace":
            await self._register(domain, self._draw.randrange(3))
        elif act == "delete" and self._now[domain]:
            self._absent.begin(domain)
            response = await self._http.delete(f"/admin/domains/{domain}", headers=self._admin)
            assert response.status_code == 200, response.text
            self._now[domain] = set()
        elif self._now[domain]:
            response = await self._http.post(f"/admin/domains/{domain}/{act}", headers=self._admin)
            assert response.status_code in (200, 400), response.text
            await self._http.post(f"/admin/domains/{domain}/unpin", headers=self._admin)

    async def _register(self, domain: str, number: int) -> None:
        path = self._versions[domain][number]
        self._now[domain].add(number)  # from now on either may answer
        body = {"stacks": [{"path": path.name}]}
        response = await self._http.put(f"/admin/domains/{domain}", json=body, headers=self._admin)
        assert response.status_code in (200, 201), response.text
        self._now[domain] = {number}
        self._absent.end(domain)

    async def _damage(self, ends: float) -> None:
        """Breaks the file of a registered domain and mends it again."""
        while time.monotonic() < ends:
            await _sleep(self._draw.uniform(5, 15), ends)
            domain = self._draw.choice(CHANGING)
            async with self._changing[domain]:
                if self._now[domain] and time.monotonic() < ends - 20:
                    shown = (await self._http.get(f"/admin/domains/{domain}", headers=self._admin)).json()
                    self._broken.begin(domain)
                    await self._break_and_mend(self._server.store / shown["stacks"][0]["file"])
                    self._broken.end(domain)
                    self.tally.counts["faults"] += 1

    async def _break_and_mend(self, file: Path) -> None:
        good = file.read_bytes()
        if self._draw.random() < 0.5:
            file.unlink()
        else:
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await asyncio.sleep(self._draw.uniform(0.5, 3))
        file.write_bytes(good)
        await asyncio.sleep(FAILURE_SECONDS + 2)  # loads that read the damage may still be about to fail

    async def _watch(self, ends: float) -> None:
        while time.monotonic() < ends:
            self.tally.samples.append(self._sample())
            ready = await self._http.get("/health/ready")
            assert ready.status_code == 200, ready.text
            await _sleep(SAMPLE_SECONDS, ends)

    def _sample(self) -> dict[str, float]:
        process = Path(f"/proc/{self._server.pid}")
        status = (process / "status").read_text()
        return {
            "at": time.monotonic(),
            "resident_set_bytes": 1024 * _number(r"VmRSS:\s+(\d+)", status),
            "threads": _number(r"Threads:\s+(\d+)", status),
            "files": float(len(os.listdir(process / "fd"))),
        }

    async def _settle(self) -> None:
        ends = time.monotonic() + 30
        while time.monotonic() < ends:
            cache = (await self._http.get("/admin/cache", headers=self._admin)).json()
            is_idle = self._server.metric("brainstacks_requests_running") == 0
            if cache["leased_bytes"] == 0 and cache["waiting"] == 0 and is_idle:
                return
            await asyncio.sleep(0.2)
        raise AssertionError(f"leases are left: {cache}")

    def _require_nothing_left(self, before: dict[str, float]) -> None:
        after = self.tally.samples[-1]
        assert self._server.metric("brainstacks_requests_waiting") == 0
        assert self._server.metric("brainstacks_kv_cache_used_ratio") == 0, "blocks are left"
        assert after["threads"] <= before["threads"] + 8, (before, after)  # of pools that grow when they are first used
        assert after["files"] <= before["files"] + NUM_CLIENTS + 8, (before, after)
        stored = {path.name for path in (self._server.store / "domains").rglob("*") if path.is_file()}
        manifest = json.loads((self._server.store / "manifest.json").read_text())
        named = {Path(stack["file"]).name for domain in manifest["domains"] for stack in domain["stacks"]}
        assert stored == named, f"files are left: {stored ^ named}"

    def _require_everything_happened(self) -> None:
        counts = self.tally.counts
        unanswered = [domain for domain in (*STABLE, *CHANGING, "base") if not counts[f"right answers of {domain}"]]
        assert not unanswered, f"no right answer of {unanswered}"
        assert counts["503 load_failed"], f"nobody met any of {counts['faults']} damaged files"

    def report(self) -> dict[str, Any]:
        """Numbers for people."""
        samples = self.tally.samples
        steady = [s for s in samples if s["at"] - samples[0]["at"] >= WARM_UP_SHARE * self._seconds]
        half = len(steady) // 2
        second, last = (_median(s["resident_set_bytes"] for s in part) for part in (steady[:half], steady[half:]))
        return {
            "seconds": self._seconds,
            "counts": dict(self.tally.counts),
            "longest_waits": sorted(self.tally.waits, reverse=True)[:5],
            "median_wait_seconds": _median(seconds for seconds, _ in self.tally.waits),
            "resident_set_bytes": {
                "second third": second,
                "last third": last,
                "ratio": last / second if last and second else None,
            },
            "resident_set_megabytes": [
                round(s["resident_set_bytes"] / 1e6) for s in samples[:: max(1, len(samples) // 30)]
            ],
            "threads": [samples[0]["threads"], samples[-1]["threads"]],
            "files": [samples[0]["files"], samples[-1]["files"]],
            "evictions": self._server.metric("brainstacks_stack_cache_evictions_total", tier="device"),
            "loads": self._server.metric("brainstacks_stack_load_seconds_count", source="file"),
            "failed_loads": self._server.metric("brainstacks_stack_load_failures_total", source="file"),
        }


async def _sleep(seconds: float, ends: float) -> None:
    """No longer than the run."""
    await asyncio.sleep(max(0.0, min(seconds, ends - time.monotonic())))


def _answer_of(response: httpx.Response) -> Answer:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"], tuple(choice["logprobs"]["token_logprobs"])


def _median(values: Iterable[float]) -> float | None:
    """None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return float(found[1])


def run_soak(
    folder: Path, asked: Asked, *, seconds: float, seed: int, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """A server on a copy of the demo store, with room for a few of eight domains. AssertionError for what is wrong."""
    store = folder / "store"
    shutil.copytree(DEMO_STORE, store)
    (folder / "import").mkdir()
    settings = {
        "engine__dtype": "auto",
        "store__device_budget_bytes": 48 << 20,
        "store__import_root": folder / "import",
        "store__verify_interval_seconds": 1,
        "engine__max_batch_rows": 8,
    }
    with ServerProcess(store, folder / "log", **settings) as server:
        soak = Soak(server, folder, asked, seconds=seconds, seed=seed)
        try:
            asyncio.run(soak.run())
        except BaseException:
            log(server.log_text[-4000:])
            log(json.dumps(soak.tally.counts))
            raise
        report = soak.report()
        assert server.stop() == 0
    return report


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description="Mixed traffic while the store changes.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run_soak(Path(folder), Asked(), seconds=60 * arguments.minutes, seed=arguments.seed)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    ratio = report["resident_set_bytes"]["ratio"]
    assert ratio is None or ratio < 1.02, "memory grew"


if __name__ == "__main__":
    main()
