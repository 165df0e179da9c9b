"""Takes a request from its fields to a running generation: choose, admit, route, lease. Knows every part, no HTTP."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from engine.grammar import GrammarCompiler
from engine.types import SamplingParams
from router.router import Route
from server.admission import Admission
from server.catalog import Catalog
from server.gap_log import GapLog
from server.generation import Generation, Parts, PromptPlan
from server.live_router import RouterFit
from server.meter import RequestMeter
from server.metrics import ServerMetrics
from server.mixes import MixChoice, choose_mix, model_names
from server.ports import EnginePort
from server.prompts import Prompt, PromptReader
from server.routing import NO_ROUTE, Routing
from server.schemas import MixRequest
from server.token_text import TokenText
from server.tracing import phase


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was read: prompts, how each is sampled, how often, and who decides the mix."""

    prompts: tuple[Prompt, ...]
    samplings: tuple[SamplingParams, ...]  # one a prompt
    num_choices: int  # answers to each prompt
    choice: MixChoice


class Service:
    """What the routes call."""

    def __init__(
        self,
        *,
        engine: EnginePort,
        catalog: Catalog,
        routing: Routing,
        reader: PromptReader,
        grammars: GrammarCompiler,
        token_text: TokenText,
        metrics: ServerMetrics,
        admission: Admission,
        served_name: str,
        gap_log: GapLog | None = None,
    ) -> None:
        self.engine = engine
        self.catalog = catalog
        self.routing = routing
        self.reader = reader
        self.grammars = grammars
        self.token_text = token_text
        self.metrics = metrics
        self.admission = admission
        self.served_name = served_name
        self._gap_log = gap_log
        self._router_fit = RouterFit()
        self._parts = Parts(engine, catalog, metrics)
        metrics.watch_load(
            heartbeat_age_seconds=engine.heartbeat_age_seconds,
            running=lambda: engine.snapshot().running,
            waiting=lambda: max(0, admission.admitted - engine.snapshot().running),
            kv_used_ratio=lambda: engine.snapshot().kv_used_ratio,
            preempted=lambda: engine.snapshot().preempted,
            stale=lambda: len(self.stale_domains()),
        )

    def models(self) -> list[str]:
        """Every model name that a client may ask for."""
        return model_names(self.served_name, self.catalog.names())

    def stale_domains(self) -> tuple[str, ...]:
        """The domains whose scores may be off, because the live router was trained on other stacks of theirs."""
        return self._router_fit.stale(self.routing.router, self.catalog.registry.manifest)

    def choose(self, model: str | None, extension: MixRequest | None) -> MixChoice:
        """Who decides the mix. ModelNotFound, DomainNotFound or InvalidRequest by name."""
        domains = self.catalog.registry.by_name
        choice = choose_mix(model=model, extension=extension, served_name=self.served_name, domains=domains)
        self.catalog.weights_of(choice, {})  # names an unknown domain before anything is spent on the request
        return choice

    async def begin(self, num_sequences: int, read: Callable[[], Awaitable[Job]], *, asked_by: str = "n") -> Generation:
        """A generation whose first prompt is in the engine; the caller closes it. Cancellable at every point.

        The job that `read` makes has so many sequences, which the field `asked_by` asks for. They are admitted before
        it is read, which is work too.
        """
        meter = RequestMeter(self.metrics)
        with ExitStack() as undo:
            ticket = undo.enter_context(self.admission.admit(num_sequences, asked_by=asked_by))
            with phase("read"):
                job = await read()
            plans = await _all_or_none(self._plan(job, prompt) for prompt in range(len(job.prompts)))
            generation = Generation(self._parts, plans, ticket=ticket, meter=meter)
            undo.callback(generation.close)
            await generation.begin()
            undo.pop_all()
        return generation

    def close(self) -> None:
        """Ends what the service itself started. Idempotent."""
        self.grammars.close()
        if self._gap_log is not None:
            self._gap_log.close()

    async def route(self, text: str) -> tuple[Route, dict[str, float]]:
        """The route of a text, and its mix without the domains that are not registered here. Admitted as a sequence."""
        with self.admission.admit(1):
            route = await self.routing.route_strictly(text)
        return route, self.catalog.weights_of(MixChoice("auto"), route.mix)

    async def _plan(self, job: Job, index: int) -> PromptPlan:
        prompt, sampling = job.prompts[index], job.samplings[index]
        is_auto = job.choice.kind == "auto"
        began = time.monotonic()
        route = NO_ROUTE
        if is_auto:
            # A conversation mostly stays with its domains: they load while the router reads.
            likely = [*job.choice.expected, *self.routing.remembered_mix(prompt.earlier_text)]
            with self.catalog.loading(likely), phase("route"):
                route = await self.routing.route(prompt.route_text)
        if route.gap:
            self._note_gap(prompt.route_text, route)
        return PromptPlan(
            token_ids=prompt.token_ids,
            samplings=tuple(_with_seeds(sampling, job.num_choices)),
            weights=self.catalog.weights_of(job.choice, route.mix),
            adaptable=is_auto,
            scores=route.scores,
            stale=tuple(name for name in self.stale_domains() if name in route.scores),
            seconds={"route": time.monotonic() - began} if is_auto else {},
        )

    def _note_gap(self, text: str, route: Route) -> None:
        """Counted each time; kept once while the route is remembered."""
        self.metrics.capability_gap.inc()
        if self._gap_log is not None and (unknown := self.routing.first_gap(text)) is not None:
            self._gap_log.keep(unknown, route.scores)


async def _all_or_none(plans: Iterable[Coroutine[Any, Any, PromptPlan]]) -> list[PromptPlan]:
    """Every plan; none of them goes on when one has failed."""
    tasks = [asyncio.ensure_future(plan) for plan in plans]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _with_seeds(sampling: SamplingParams, count: int) -> Sequence[SamplingParams]:
    """Choice i is seeded with seed + i: different from its siblings, and the same whenever it is asked for."""
    if sampling.seed is None:
        return [sampling] * count
    return [replace(sampling, seed=_wrap_int64(sampling.seed + offset)) for offset in range(count)]


def _wrap_int64(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
