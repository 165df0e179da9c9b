"""Collects a whole answer, and makes what every answer carries. Knows JSON; not HTTP, not an endpoint's own shape."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import orjson

from engine.types import FinishedEvent, PromptEvent, TokenLogprob, TokensEvent
from server.generation import Generation, PromptRun

Json = dict[str, Any]

MANY_LOGPROBS = 256  # positions; with twenty alternatives each they take ten milliseconds


@dataclass(slots=True)
class CollectedChoice:
    """One choice, whole."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: str | None = None


class AnswerShape(Protocol):
    """How one endpoint shows what the engine says."""

    def envelope(self, *, chunk: bool) -> Json: ...

    def opening(self, index: int) -> Json | None: ...

    def prompt(self, index: int, event: PromptEvent) -> Json | None: ...

    def tokens(self, index: int, event: TokensEvent) -> Sequence[Json]: ...

    def finish(self, index: int, event: FinishedEvent) -> Sequence[Json]: ...

    def choice(self, index: int, collected: CollectedChoice) -> Json: ...


def mix_report(run: PromptRun) -> Json:
    """The `brainstacks` extension of one prompt's answer. Dropped and stale domains are named only if there are any."""
    report: Json = {
        "scores": dict(run.plan.scores),
        "mix": dict(run.leased.weights),
        "cold": list(run.leased.cold),
        "seconds": {phase: round(seconds, 6) for phase, seconds in run.seconds.items()},
    }
    if run.leased.dropped:
        report["dropped"] = dict(run.leased.dropped)
    if run.plan.stale:
        report["stale"] = list(run.plan.stale)
    return report


def usage(generation: Generation, *, written: int | None = None) -> Json:
    """Token counts as OpenAI counts them: a prompt once, however many answers it has.

    `written` are the tokens so far, of a generation that still runs.
    """
    read, written = generation.prompt_tokens, generation.completion_tokens if written is None else written
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def is_long(*logprobs: Sequence[object] | None) -> bool:
    """Whether to make JSON of so many log probabilities would hold up the event loop."""
    return sum(len(known or ()) for known in logprobs) > MANY_LOGPROBS


async def collect_answer(generation: Generation, shape: AnswerShape) -> bytes:
    """Waits for the whole answer, as JSON. One with many log probabilities is written off the event loop."""
    collected = [CollectedChoice() for _ in range(generation.num_choices)]
    async for index, event in generation.events():
        choice = collected[index]
        if isinstance(event, PromptEvent):
            choice.prompt_logprobs = event.prompt_logprobs
        elif isinstance(event, TokensEvent):
            choice.text += event.text
            choice.logprobs.extend(event.logprobs)
        elif isinstance(event, FinishedEvent):
            choice.finish_reason = event.reason
    write = partial(_write, generation, shape, collected)
    logprobs = [known for choice in collected for known in (choice.logprobs, choice.prompt_logprobs)]
    return await asyncio.to_thread(write) if is_long(*logprobs) else write()


def _write(generation: Generation, shape: AnswerShape, collected: Sequence[CollectedChoice]) -> bytes:
    reports = [mix_report(run) for run in generation.runs]
    answer = shape.envelope(chunk=False) | {
        "choices": [shape.choice(index, choice) for index, choice in enumerate(collected)],
        "usage": usage(generation),
        "brainstacks": reports[0] if len(reports) == 1 else reports,
    }
    return orjson.dumps(answer)
