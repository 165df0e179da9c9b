"""Whatever the store went through, an answer is what a fresh engine gives with that mix: the same log probabilities.

Histories are loads, evictions, replacements, deletions, pins, cancelled and concurrent requests, in any order, against
the whole server on a tiny base; the reference is a new engine for every mix, whose stacks were arranged the slow way.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.engine import Engine
from engine.model.base import Base, load_base
from engine.model.moe_lora import MoeLoraConfig, serving_stack
from engine.slots import ResidentDomain
from engine.types import SamplingParams
from server.compose import compose_app_for
from server.config import load_settings
from stack_store.format import pack_groups, read_stack, resident_bytes, write_stack
from tests.engines import Client
from tests.servers import serve_app
from tests.stacks import header_for, random_projections

CONFIG = MoeLoraConfig(num_experts=4, rank=4, top_k=2, alpha=8.0)
DOMAINS = ("chat", "code", "law", "math")
PROMPTS = ([5, 6, 7, 8], list(range(20, 60)), [5, 6, 7, 8, 9, 10])
NUM_TOKENS = 6
NUM_STEPS = 80
WEIGHTS = (0.2, 0.5, 1.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A sum on a GPU depends on the shape of its batch; on a CPU every bit is the same.
TOLERANCE = 0.0 if DEVICE == "cpu" else 1e-3

Answer = tuple[list[int], list[float]]  # tokens and their log probabilities


class Reference:
    """Fresh engines, and every version of every domain that there ever was."""

    def __init__(self, base_folder: Path, folder: Path) -> None:
        self._base_folder = base_folder
        self._folder = folder
        self._seeds = 0
        self._answers: dict[object, Answer] = {}
        self.base = self._load()

    def write_version(self, domain: str) -> str:
        """A file of a stack that never was before; its name."""
        self._seeds += 1
        base = self.base
        path = self._folder / f"{domain}-{self._seeds}.safetensors"
        header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=domain)
        weights = random_projections(base.geometry, CONFIG, seed=self._seeds, size=0.05)
        write_stack(path, header, pack_groups(header, weights))
        return path.name

    def answer(self, prompt: list[int], mix: Mapping[str, tuple[str, float]]) -> Answer:
        """Of files and weights by domain."""
        key = tuple(prompt), tuple(sorted(mix.items()))
        if key not in self._answers:
            base = self._load()
            engine = Engine(base, max_batch_rows=1, max_model_len=256, kv_cache_tokens=256)
            domains = [
                (self._domain(name, file, base, panelled=engine.wants_panels), weight)
                for name, (file, weight) in mix.items()
            ]
            engine.start()
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
            answer = Client(engine).run(prompt, sampling, domains)
            engine.stop()
            self._answers[key] = answer.token_ids, [logprob.logprob for logprob in answer.logprobs]
        return self._answers[key]

    def _domain(self, name: str, file: str, base: Base, *, panelled: bool) -> ResidentDomain:
        read = read_stack(self._folder / file, dtype=base.dtype)
        stack = serving_stack(read.header, read.groups, dtype=base.dtype, device=base.device, panelled=panelled)
        return ResidentDomain(name, file, (stack,))

    def _load(self) -> Base:
        return load_base(str(self._base_folder), base_format="dense", dtype="float32", device=DEVICE)


class History:
    """A server to which things happen, and what each domain was and is meanwhile."""

    def __init__(self, http: httpx.Client, reference: Reference, seed: int) -> None:
        self._http = http
        self._reference = reference
        self._draw = random.Random(seed)
        self._pool = ThreadPoolExecutor(4)
        self._running: list[tuple[list[int], dict[str, float], dict[str, set[str | None]], Future[httpx.Response]]] = []
        self.current: dict[str, str | None] = dict.fromkeys(DOMAINS)
        self._last: dict[str, str] = {}
        self.num_compared = 0

    def step(self) -> None:
        """Something happens."""
        acts: list[tuple[Callable[[str], None], int]] = [
            (self.ask, 16), (self.settle, 4), (self.replace, 3), (self.remove, 1), (self.restore, 2), (self.hang_up, 1),
            (self.pin, 1), (self.unpin, 4), (self.prefetch, 2),
        ]  # fmt: skip
        act = self._draw.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
        act(self._draw.choice(DOMAINS))

    def ask(self, domain: str) -> None:
        """Some mix of what is registered, or of the base alone; not waited for."""
        prompt, mix = self._prompt_and_mix()
        seen = {name: {self.current[name]} for name in mix}
        body = self._body(prompt, mix)
        self._running.append((prompt, mix, seen, self._pool.submit(self._http.post, "/v1/completions", json=body)))

    def settle(self, domain: str = "") -> None:
        """All that was asked is answered, and every answer is that of a fresh engine."""
        for prompt, mix, seen, future in self._running:
            self._compare(prompt, mix, seen, future.result())
        self._running.clear()

    def replace(self, domain: str) -> None:
        self._register(domain, self._reference.write_version(domain))

    def restore(self, domain: str) -> None:
        """The same content once more, also behind a deletion that may still drain."""
        if domain in self._last:
            self._register(domain, self._last[domain])

    def remove(self, domain: str) -> None:
        answer = self._http.delete(f"/admin/domains/{domain}")
        assert answer.status_code == (404 if self.current[domain] is None else 200), answer.text
        self._became(domain, None)

    def hang_up(self, domain: str) -> None:
        """A stream whose client leaves at its first piece, or when it is refused."""
        prompt, mix = self._prompt_and_mix()
        body = self._body(prompt, mix) | {"stream": True, "max_tokens": 100}
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_raw(), None)

    def pin(self, domain: str) -> None:
        assert self._residency(domain, "pin") in (200, 400, 404)  # beside another there is no room for a second

    def unpin(self, domain: str) -> None:
        assert self._residency(domain, "unpin") in (200, 404)

    def prefetch(self, domain: str) -> None:
        assert self._residency(domain, "prefetch") in (200, 400, 404)

    def close(self) -> None:
        self._pool.shutdown()

    def _residency(self, domain: str, action: str) -> int:
        return self._http.post(f"/admin/domains/{domain}/{action}").status_code

    def _prompt_and_mix(self) -> tuple[list[int], dict[str, float]]:
        registered = [name for name in DOMAINS if self.current[name] is not None]
        names = self._draw.sample(registered, self._draw.randint(0, min(2, len(registered))))
        return self._draw.choice(PROMPTS), {name: self._draw.choice(WEIGHTS) for name in names}

    @staticmethod
    def _body(prompt: list[int], mix: Mapping[str, float]) -> dict[str, Any]:
        extension: dict[str, Any] = {"mix": dict(mix)} if mix else {"mode": "base"}
        return {
            "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True,
            "brainstacks": extension,
        }  # fmt: skip

    def _register(self, domain: str, file: str) -> None:
        answer = self._http.put(f"/admin/domains/{domain}", json={"stacks": [{"path": file}]})
        assert answer.status_code in (200, 201), answer.text
        self._last[domain] = file
        self._became(domain, file)

    def _became(self, domain: str, file: str | None) -> None:
        self.current[domain] = file
        for _, _, seen, _ in self._running:
            if domain in seen:
                seen[domain].add(file)

    def _compare(
        self, prompt: list[int], mix: Mapping[str, float], seen: Mapping[str, set[str | None]], answer: httpx.Response
    ) -> None:
        if answer.status_code != 200:  # only for a domain that went away meanwhile, or for pins that leave no room
            code = answer.json()["error"]["code"]
            went_away = any(None in files for files in seen.values())
            assert code == "mix_too_large" or (code == "domain_not_found" and went_away), answer.text
            return
        logprobs = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        versions = [[file for file in seen[name] if file is not None] for name in mix]
        weights = list(mix.values())
        possible = [
            self._reference.answer(prompt, dict(zip(mix, zip(files, weights, strict=True), strict=True)))[1]
            for files in product(*versions)
        ]
        is_one = any(_are_close(logprobs, expected) for expected in possible)
        assert is_one, f"{mix} of {versions}: {logprobs}, not of {possible}"
        self.num_compared += 1


def _are_close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and all(abs(a - b) <= TOLERANCE for a, b in zip(some, others, strict=True))


@contextmanager
def history(folder: Path, base_folder: Path, seed: int) -> Iterator[tuple[History, httpx.Client]]:
    """A server with room for two of four domains, all of which are registered."""
    (folder / "files").mkdir()
    reference = Reference(base_folder, folder / "files")
    one = resident_bytes(header_for(reference.base.geometry, CONFIG), reference.base.dtype)
    settings = load_settings(
        flags={
            "server": {"admin_key": "k", "served_model_name": "tiny"},
            "engine": {"max_model_len": 256, "kv_cache_tokens": 512, "max_batch_rows": 4},
            "store": {
                "path": folder / "store", "import_root": folder / "files", "device_budget_bytes": 2 * one + 1,
                "verify_bytes_per_second": 10**6, "verify_interval_seconds": 0.2,
                **({"host_budget_bytes": 3 * one} if DEVICE == "cuda" else {}),
            },
        }
    )  # fmt: skip
    app = compose_app_for(load_base(str(base_folder), base_format="dense", dtype="float32", device=DEVICE), settings)
    with serve_app(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        http.headers["authorization"] = "Bearer k"
        with closing(History(http, reference, seed)) as told:
            for domain in DOMAINS:
                told.replace(domain)
            yield told, http


@pytest.mark.parametrize("seed", range(3))
def test_any_history_gives_the_logits_of_a_fresh_engine(
    tmp_path: Path, tiny_base_folder: Callable[[str], Path], seed: int
) -> None:
    with history(tmp_path, tiny_base_folder("llama"), seed) as (told, http):
        for _ in range(NUM_STEPS):
            told.step()
        told.settle()
        cache = http.get("/admin/cache").json()
        assert cache["leased_bytes"] == 0
        assert cache["waiting"] == 0
        metrics = http.get("/metrics").text
    assert told.num_compared > NUM_STEPS // 4
    assert 'brainstacks_stack_cache_evictions_total{tier="device"} 0.0' not in metrics  # there was something to evict
    assert "brainstacks_stack_integrity_damaged_files 0.0" in metrics
