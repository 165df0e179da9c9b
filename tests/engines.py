"""Runs requests through a real engine and collects what comes of them."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.slots import ResidentDomain
from engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
)

TIMEOUT_SECONDS = 60


@dataclass(slots=True)
class Collected:
    """Everything that one request produced."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    finished: FinishedEvent | None = None
    error: Exception | None = None
    pieces: list[str] = field(default_factory=list)


class Client:
    """Submits to an engine and waits for the end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._count = 0

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        mix: Sequence[tuple[ResidentDomain, float]] = (),
    ) -> tuple[str, "queue.Queue[Event]"]:
        """Starts a request; returns its id and its events."""
        self._count += 1
        events: queue.Queue[Event] = queue.Queue()
        request = GenerationRequest(f"request-{self._count}", tuple(prompt_ids), sampling, tuple(mix))
        self.engine.submit(request, events.put)
        return request.request_id, events

    def run(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        mix: Sequence[tuple[ResidentDomain, float]] = (),
    ) -> Collected:
        """One request, alone unless others run already."""
        return collect(self.submit(prompt_ids, sampling, mix)[1])


def collect(events: "queue.Queue[Event]") -> Collected:
    """Waits for a request's last event."""
    collected = Collected()
    while True:
        match events.get(timeout=TIMEOUT_SECONDS):
            case TokensEvent(text, token_ids, logprobs):
                collected.text += text
                collected.pieces.append(text)
                collected.token_ids += token_ids
                collected.logprobs += logprobs
            case PromptEvent(prompt_logprobs, cached_tokens):
                collected.cached_tokens = cached_tokens
                collected.prompt_logprobs = prompt_logprobs
            case FinishedEvent() as finished:
                collected.finished = finished
                return collected
            case FailedEvent(error):
                collected.error = error
                return collected
