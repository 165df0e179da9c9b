"""Measures a running server: by clients that ask again when they were answered, or by requests that come at a rate.

Knows HTTP only.
"""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import httpx

from server.client import EventReader, bearer, request_of, require_stream
from server.errors import RequestFailed

FIGURES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "max": 1.0}
OVERLOADED = (429, 503)  # answers of a server that has too much to do: counted, not the end of the run

Mix = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Route:
    """What the requests of one kind ask the server to mix; None leaves it to the router, {} is the base alone."""

    name: str
    mix: Mix | None


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is asked, and when."""

    url: str
    api_key: str | None
    requests: int
    prompt: str | None  # None: every prompt is another, in this run and of other seeds, of about `prompt_tokens`
    prompt_tokens: int
    max_tokens: int
    routes: Sequence[Route]  # taken in turn
    clients: int  # that ask at once, unless there is
    rate: float | None  # of requests a second, at random times (exponential gaps), however long the answers take
    seed: int  # of the times and the prompts


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request. Seconds count from the moment at which it was due."""

    route: str
    first_token_seconds: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    gaps: Sequence[float]  # seconds between two pieces of the stream


@dataclass(frozen=True, slots=True)
class Refusal:
    """One request that an overloaded server refused."""

    route: str
    status: int


def run_bench(plan: BenchPlan, on_answer: Callable[[], None]) -> dict[str, Any]:
    """The figures of a run, with the settings that made them. `on_answer` is called after every request.

    Raises RequestFailed if the server cannot be reached, or refuses a request for another reason than being overloaded.
    """
    began = time.monotonic()
    try:
        answers = asyncio.run(_run(plan, on_answer))
    except ExceptionGroup as failures:  # one ends all others
        raise failures.exceptions[0] from None
    return figures_of(plan, answers, time.monotonic() - began)


def arrivals(requests: int, rate: float, seed: int) -> Iterator[float]:
    """When each of the requests is due, in seconds: a Poisson process, the same for the same seed."""
    random, due = Random(seed), 0.0  # noqa: S311 - no secret
    for _ in range(requests):
        yield due
        due += random.expovariate(rate)


async def _run(plan: BenchPlan, on_answer: Callable[[], None]) -> list[Sample | Refusal]:
    limits = httpx.Limits(max_connections=None)
    answers: list[Sample | Refusal] = []
    async with httpx.AsyncClient(base_url=plan.url, headers=bearer(plan.api_key), timeout=600.0, limits=limits) as http:

        async def ask(number: int, due: float) -> None:
            answers.append(await _ask(http, plan, number, due))
            on_answer()

        if plan.rate is not None:
            await _ask_at_rate(plan, plan.rate, ask)
        else:
            left = iter(range(plan.requests))

            async def run_client() -> None:
                for number in left:  # shared, so that each number is asked once
                    await ask(number, time.monotonic())

            async with asyncio.TaskGroup() as running:
                for _ in range(plan.clients):
                    running.create_task(run_client())
    return answers


async def _ask_at_rate(plan: BenchPlan, rate: float, ask: Callable[[int, float], Any]) -> None:
    began = time.monotonic()
    async with asyncio.TaskGroup() as requests:
        for number, due in enumerate(arrivals(plan.requests, rate, plan.seed)):
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            requests.create_task(ask(number, began + due))


async def _ask(http: httpx.AsyncClient, plan: BenchPlan, number: int, due: float) -> Sample | Refusal:
    route = plan.routes[number % len(plan.routes)]
    times: list[float] = []
    usage: dict[str, Any] = {}
    request = request_of(http, "POST", "/v1/chat/completions", json=_body(plan, route, number))
    try:
        async with aclosing(await http.send(request, stream=True)) as response:
            if response.status_code in OVERLOADED:
                return Refusal(route.name, response.status_code)
            if not response.is_success:
                await response.aread()
            require_stream(response)
            async for chunk in _chunks(response):
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    times.append(time.monotonic())
                usage = chunk.get("usage") or usage
    except httpx.HTTPError as error:
        raise RequestFailed(f"{plan.url}: {error!r}") from error
    ended = time.monotonic()
    details = usage.get("prompt_tokens_details") or {}
    return Sample(
        route=route.name,
        first_token_seconds=(times[0] if times else ended) - due,
        seconds=ended - due,
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        gaps=[later - earlier for earlier, later in pairwise(times)],
    )


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    events = EventReader()
    async for piece in response.aiter_bytes():
        for chunk in events.read(piece):
            yield chunk
    events.require_end()


def _body(plan: BenchPlan, route: Route, number: int) -> dict[str, Any]:
    content = plan.prompt
    if content is None:  # a common word is one token; the numbers come first, so that no two prompts begin alike
        numbers = f"{plan.seed} {number}"
        content = numbers + " and" * max(0, plan.prompt_tokens - len(numbers))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": plan.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if route.mix is not None:
        body["brainstacks"] = {"mix": dict(route.mix)}
    return body


def figures_of(plan: BenchPlan, answers: Sequence[Sample | Refusal], seconds: float) -> dict[str, Any]:
    """What a run of `seconds` showed, in all and by route."""
    return {
        "url": plan.url,
        "load": {"clients": plan.clients} if plan.rate is None else {"rate": plan.rate},
        "seed": plan.seed,
        "requests": plan.requests,
        "max_tokens": plan.max_tokens,
        "seconds": round(seconds, 3),
        **_summary(answers, seconds),
        "routes": {
            route.name: _summary([answer for answer in answers if answer.route == route.name], seconds)
            for route in plan.routes
        },
    }


def _summary(answers: Sequence[Sample | Refusal], seconds: float) -> dict[str, Any]:
    samples = [answer for answer in answers if isinstance(answer, Sample)]
    refused = Counter(str(answer.status) for answer in answers if isinstance(answer, Refusal))
    tokens = sum(sample.completion_tokens for sample in samples)
    per_token = [
        (sample.seconds - sample.first_token_seconds) / (sample.completion_tokens - 1)
        for sample in samples
        if sample.completion_tokens > 1
    ]
    return {
        "answered": len(samples),
        "refused": dict(refused),
        "prompt_tokens": sum(sample.prompt_tokens for sample in samples),
        "cached_tokens": sum(sample.cached_tokens for sample in samples),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        "requests_per_second": round(len(samples) / seconds, 3),
        "first_token_seconds": _spread([sample.first_token_seconds for sample in samples]),
        "token_seconds": _spread(per_token),  # of each request's mean
        "gap_seconds": _spread([gap for sample in samples for gap in sample.gaps]),
        "request_seconds": _spread([sample.seconds for sample in samples]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    spread = {name: round(ordered[round(share * (len(ordered) - 1))], 4) for name, share in FIGURES.items()}
    return {"mean": round(statistics.fmean(ordered), 4), **spread}
