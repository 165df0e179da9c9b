"""Measures a running server with a fixed number of clients, each asking again when it was answered. Knows HTTP only."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from server.errors import RequestFailed


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is asked, how often, and by how many at once."""

    url: str
    api_key: str | None
    concurrency: int
    requests: int
    prompt: str
    max_tokens: int
    mix: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request."""

    first_token_seconds: float
    seconds: float
    completion_tokens: int


def run_bench(plan: BenchPlan, on_answer: Callable[[], None]) -> dict[str, Any]:
    """The figures of a run, with the settings that made them. `on_answer` is called after every request."""
    began = time.monotonic()
    samples = asyncio.run(_run_clients(plan, on_answer))
    return figures_of(plan, samples, time.monotonic() - began)


async def _run_clients(plan: BenchPlan, on_answer: Callable[[], None]) -> list[Sample]:
    left = iter(range(plan.requests))
    samples: list[Sample] = []
    headers = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    async with httpx.AsyncClient(base_url=plan.url, headers=headers, timeout=600.0) as http:

        async def run_client() -> None:
            for _ in left:  # shared, so that each number is asked once
                samples.append(await _ask(http, plan))
                on_answer()

        await asyncio.gather(*(run_client() for _ in range(plan.concurrency)))
    return samples


async def _ask(http: httpx.AsyncClient, plan: BenchPlan) -> Sample:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": plan.prompt}],
        "max_tokens": plan.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.mix is not None:
        body["brainstacks"] = {"mix": plan.mix}
    began = time.monotonic()
    first, tokens = None, 0
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                raise RequestFailed(f"{response.status_code}: {(await response.aread()).decode(errors='replace')}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RequestFailed(chunk["error"]["message"])
                if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = time.monotonic()
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        raise RequestFailed(f"{plan.url}: {error!r}") from error
    ended = time.monotonic()
    return Sample((first or ended) - began, ended - began, tokens)


def figures_of(plan: BenchPlan, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    tokens = sum(sample.completion_tokens for sample in samples)
    decode = [
        (sample.seconds - sample.first_token_seconds) / (sample.completion_tokens - 1)
        for sample in samples
        if sample.completion_tokens > 1
    ]
    return {
        "url": plan.url,
        "concurrency": plan.concurrency,
        "requests": plan.requests,
        "max_tokens": plan.max_tokens,
        "mix": plan.mix,
        "seconds": round(seconds, 3),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        "requests_per_second": round(len(samples) / seconds, 3),
        "first_token_seconds": _spread([sample.first_token_seconds for sample in samples]),
        "inter_token_seconds": _spread(decode),
        "request_seconds": _spread([sample.seconds for sample in samples]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    shares = {"p50": 0.50, "p95": 0.95, "max": 1.0}
    spread = {name: round(ordered[round(share * (len(ordered) - 1))], 4) for name, share in shares.items()}
    return {"mean": round(statistics.fmean(ordered), 4), **spread}
