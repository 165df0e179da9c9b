"""Runs the sequences of one HTTP request: lease, submit, events, end. Knows engine and catalog; not HTTP, not text.

A lease ends in one place, `_end_sequence`, when the engine has said its last word about the last sequence that uses
it: that holds for answers, failures and clients that have gone alike. Lives on the event loop; the engine's thread only
posts.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from engine.errors import EngineStopped
from engine.types import Event, FailedEvent, FinishedEvent, GenerationRequest, PromptEvent, SamplingParams, TokensEvent
from server.admission import Ticket
from server.catalog import Catalog, LeasedMix
from server.meter import RequestMeter
from server.metrics import ServerMetrics
from server.mixes import show_mix
from server.ports import EnginePort
from server.tracing import phase

MAX_SHOWN_CHARACTERS = 2000  # proxies and clients refuse long headers


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt whose mix is decided. One SamplingParams a choice."""

    token_ids: tuple[int, ...]
    samplings: tuple[SamplingParams, ...]
    weights: Mapping[str, float]
    adaptable: bool  # whether the mix may shrink to what fits and exists: the router's may, a client's own may not
    scores: Mapping[str, float] = field(default_factory=dict)
    stale: tuple[str, ...] = ()  # of the scores, those that the router may have wrong
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class PromptRun:
    """A prompt on its way: what it holds, how many of its sequences run, and how long its phases took."""

    plan: PromptPlan
    first_index: int  # of its choices among those of the whole request
    leased: LeasedMix  # until the lease is granted, the weights that are planned
    open_sequences: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """What every generation shares."""

    engine: EnginePort
    catalog: Catalog
    metrics: ServerMetrics


class Generation:
    """All sequences of one request. Whoever begins it must close it."""

    def __init__(self, parts: Parts, plans: Sequence[PromptPlan], *, ticket: Ticket, meter: RequestMeter) -> None:
        self._parts = parts
        self._id = uuid.uuid4().hex  # not the client's own id, which another request may bear too
        self._ticket = ticket
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._starts: list[asyncio.Task[None]] = []
        self._live: dict[int, str] = {}  # choice index -> the engine's request id
        self.runs: list[PromptRun] = []
        for plan in plans:
            planned = LeasedMix(weights=plan.weights)
            self.runs.append(PromptRun(plan, self.num_choices, planned, seconds=dict(plan.seconds)))

    @property
    def num_choices(self) -> int:
        """Sequences of all prompts together."""
        return sum(len(run.plan.samplings) for run in self.runs)

    @property
    def prompt_tokens(self) -> int:
        """Tokens read, each prompt counted once."""
        return sum(len(run.plan.token_ids) for run in self.runs)

    @property
    def cached_tokens(self) -> int:
        """Of the tokens read, those whose keys and values were in the cache already."""
        return sum(run.cached_tokens for run in self.runs)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(run.completion_tokens for run in self.runs)

    @property
    def tokens_used(self) -> int:
        """Read and written so far, also by an answer that was broken off."""
        return self.prompt_tokens + self._meter.num_tokens

    @property
    def shown_mix(self) -> str:
        """The mixes as header and log show them: different ones divided by `;`, or their number if they are long."""
        mixes = list(dict.fromkeys(show_mix(run.leased.weights) for run in self.runs))
        shown = ";".join(mixes)
        return shown if len(shown) <= MAX_SHOWN_CHARACTERS else f"{len(mixes)} mixes"

    def run_of(self, index: int) -> PromptRun:
        """The prompt that a choice answers."""
        return next(run for run in reversed(self.runs) if run.first_index <= index)

    async def begin(self) -> None:
        """Returns when the first prompt is in the engine; raises if that failed.

        Prompts lease one by one, not together: a request that held one mix while it waited for the next could wait
        for another that does the same.
        """
        self._starts = [self._loop.create_task(self._start(run)) for run in self.runs]
        for task, run in zip(self._starts, self.runs, strict=True):
            task.add_done_callback(partial(self._note_failed_start, run))
        started, _ = await asyncio.wait(self._starts, return_when=asyncio.FIRST_COMPLETED)
        for task in started:
            task.result()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice index, event) until every choice has finished. Raises what the engine could not go on with."""
        unfinished = self.num_choices
        while unfinished:
            index, event = await self._events.get()
            if isinstance(event, FailedEvent):
                raise event.error
            if isinstance(event, FinishedEvent):
                if event.reason == "cancelled":  # not by us, or nobody would listen here
                    raise EngineStopped("the engine stopped before the answer was complete")
                unfinished -= 1
            yield index, event

    def close(self) -> None:
        """Ends what still runs and gives the room back; leases follow with the engine's last events. Idempotent."""
        for task in self._starts:
            task.cancel()
        for request_id in list(self._live.values()):
            self._parts.engine.cancel(request_id)
        self._ticket.give_back()

    async def _start(self, run: PromptRun) -> None:
        began = time.monotonic()
        with phase("page_in"):
            run.leased = await self._parts.catalog.lease_mix(run.plan.weights, adaptable=run.plan.adaptable)
        # No await from here on, so that a lease is never without an owner.
        run.seconds["page_in"] = time.monotonic() - began
        run.open_sequences = len(run.plan.samplings)
        submitted = 0
        try:
            for sampling in run.plan.samplings:
                self._submit(run, run.first_index + submitted, sampling)
                submitted += 1
        finally:
            for _ in range(submitted, len(run.plan.samplings)):
                self._end_sequence(run)
        self._parts.metrics.mix_chosen(run.leased.weights)
        self._parts.metrics.prompt_tokens.inc(len(run.plan.token_ids))

    def _submit(self, run: PromptRun, index: int, sampling: SamplingParams) -> None:
        request_id = f"{self._id}-{index}"
        request = GenerationRequest(request_id, run.plan.token_ids, sampling, run.leased.domains)
        self._parts.engine.submit(request, partial(self._post, run, index))
        self._live[index] = request_id

    def _post(self, run: PromptRun, index: int, event: Event) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._deliver, run, index, event)

    def _deliver(self, run: PromptRun, index: int, event: Event) -> None:
        if isinstance(event, TokensEvent) and event.token_ids:
            self._meter.tokens_came(index, len(event.token_ids))
        elif isinstance(event, PromptEvent):
            run.cached_tokens = max(run.cached_tokens, event.cached_tokens)
        elif isinstance(event, FinishedEvent | FailedEvent):
            self._live.pop(index, None)
            if isinstance(event, FinishedEvent):
                self._account(run, event)
            self._end_sequence(run)
        self._events.put_nowait((index, event))

    def _end_sequence(self, run: PromptRun) -> None:
        run.open_sequences -= 1
        if run.open_sequences == 0:
            run.leased = run.leased.release()
            self._meter.prompt_done(run.seconds)

    def _account(self, run: PromptRun, event: FinishedEvent) -> None:
        run.completion_tokens += event.completion_tokens
        self._parts.metrics.completion_tokens.inc(event.completion_tokens)
        for name, seconds in event.seconds.items():
            run.seconds[name] = max(run.seconds.get(name, 0.0), seconds)

    def _note_failed_start(self, run: PromptRun, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, Exception)
            self._events.put_nowait((run.first_index, FailedEvent(error)))
