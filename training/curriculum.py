"""Trains a recipe's domains in their order: the outer loop, and how it goes on after a kill. Knows no mathematics.

For each domain: its rounds, each frozen as a file; the store learns of all of them at once; then what the domain claims
of each projection's output is measured and protected, and every domain so far is examined again. Each part is a
function of the recipe and of the files before it, so a run that was killed repeats what it had not finished and comes
to the same result.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from engine.model.base import Base
from engine.model.moe_lora import MoeLoraConfig
from router.policy import RoutingPolicy
from stack_store.registry import StackRegistry
from training.context import Context, Rounds
from training.data.chat_tokens import special_tokens
from training.data.examples import DomainExamples, Example, render_domain
from training.data.preparation import prepare_data
from training.errors import TrainingDiverged
from training.forgetting import Examiner, add_row
from training.freezing import load_frozen, write_frozen
from training.frozen_domains import FrozenDomains
from training.journal import Journal
from training.recipe import DomainSection, Recipe, StackSection
from training.reports import (
    DomainReport,
    ForgettingReport,
    RoundReport,
    read_report,
    read_report_of,
    report_path,
    write_report,
)
from training.round_training import Progress, Task, train_round
from training.seeds import derive_seed
from training.workers import Workers


class Spectator(Protocol):
    """Who is told how a run goes."""

    def round_starts(self, domain: str, round: int, steps: int) -> Callable[[Progress], None]:
        """Returns what is to be called after each step."""
        ...

    def round_ends(self, domain: str, report: RoundReport) -> None: ...

    def domain_ends(self, report: DomainReport, *, trained_now: bool) -> None: ...


class Curriculum:
    """One run of a recipe into a store."""

    def __init__(
        self, recipe: Recipe, base: Base, store: Path, *, policy: RoutingPolicy, workers: Workers, spectator: Spectator
    ) -> None:
        self._recipe, self._base, self._store, self._policy = recipe, base, store, policy
        self._workers, self._spectator = workers, spectator
        self._data = prepare_data(recipe, own_tokens=special_tokens(base.tokenizer))
        # Now, with the data: a file that changes while the run goes on must not change what the data are called.
        self._digests = [recipe.domain_digest(index) for index in range(len(recipe.settings.domains))]
        self._held_out: dict[str, list[Example]] = {}
        self._frozen = FrozenDomains(recipe, base, store, workers)

    def run(self, *, until: str | None = None) -> list[DomainReport]:
        """Trains every domain, or those up to `until`, that is not finished; returns all their reports."""
        self._write("data", self._data.report)
        settings = self._recipe.settings.model_dump(mode="json")
        self._write("recipe", {"text": self._recipe.text, "settings": settings})
        reports = []
        for domain, digest in zip(self._recipe.settings.domains, self._digests, strict=True):
            reports.append(self._domain(domain, digest))
            if domain.name == until:
                break
        return reports

    def _domain(self, domain: DomainSection, digest: str) -> DomainReport:
        examples = render_domain(
            self._base.tokenizer,
            self._data.domains[domain.name],
            max_tokens=self._recipe.settings.training.max_example_tokens,
        )
        self._held_out[domain.name] = examples.held_out
        journal = Journal(self._store, domain=domain.name, digest=digest)
        if self._workers.is_first:
            journal.require_records(self._data.domains[domain.name].digest)
        finished = self._finished_report(domain.name, digest)
        earlier = dict(self._frozen.stacks)
        if finished is None:
            self._train_rounds(domain, digest, journal, examples)
        self._frozen.take_in(domain.name, journal, examples.held_out, is_new=finished is None)
        report = finished or self._examine(domain.name, digest, journal, examples, earlier)
        if self._workers.is_first:
            journal.tidy()
        self._spectator.domain_ends(report, trained_now=finished is None)
        return report

    def _finished_report(self, domain: str, digest: str) -> DomainReport | None:
        """The domain's report, if the store has its stacks as this recipe makes them, and all was measured."""
        if not self._is_registered(domain, digest):
            return None
        report = read_report(report_path(self._store, domain), DomainReport)
        return report if report is not None and report.recipe_digest == digest else None

    def _train_rounds(self, domain: DomainSection, digest: str, journal: Journal, examples: DomainExamples) -> None:
        """Trains the rounds that are not finished and registers the domain."""
        most = domain.rounds or self._recipe.settings.training.rounds
        # Without their stacks, which are the store's once it has them, rounds are worth nothing.
        with_stacks = not self._is_registered(domain.name, digest)
        while not (rounds := journal.rounds(with_stacks=with_stacks)) or (rounds[-1].kept and len(rounds) < most):
            self._round(domain, digest, journal, rounds, examples)
            self._workers.wait()
        if not rounds[0].kept:
            raise TrainingDiverged(
                f"domain {domain.name!r}: its first round brought the held-out loss from {rounds[0].start_loss:.4f} to "
                f"{rounds[0].best_loss:.4f}; there is no stack to keep"
            )
        if self._workers.is_first and not self._is_registered(domain.name, digest):
            with closing(StackRegistry.open(self._store)) as registry:
                registry.register_domain(domain.name, [journal.stack_path(r.round) for r in rounds if r.kept])
        self._workers.wait()

    def _round(
        self,
        domain: DomainSection,
        digest: str,
        journal: Journal,
        finished: Sequence[RoundReport],
        examples: DomainExamples,
    ) -> None:
        settings = self._recipe.settings
        number = len(finished) + 1
        own = load_frozen(self._base, [journal.stack_path(r.round) for r in finished])
        training = settings.training.model_copy(update={"steps": domain.steps or settings.training.steps})
        task = Task(
            base=self._base,
            train=examples.train,
            held_out=examples.held_out,
            context=Context(training.context, own=own, earlier=self._frozen.stacks),
            protected=self._frozen.protected if settings.null_space.enabled else None,
            settings=training,
            workers=self._workers,
        )
        try:
            stack, report, experts = train_round(
                task,
                round=number,
                config=stack_config(settings.stack),
                seed=derive_seed(settings.seed, domain.name, number),
                on_progress=self._spectator.round_starts(domain.name, number, training.steps),
            )
        except TrainingDiverged as error:
            raise TrainingDiverged(f"domain {domain.name!r}, round {number}: {error}") from error
        if self._workers.is_first:
            if report.kept:
                write_frozen(
                    self._base,
                    stack,
                    task.protected,
                    journal.stack_path(number),
                    domain=domain.name,
                    round=number,
                    section=settings.stack,
                    recipe_digest=digest,
                )
            journal.finish_round(report, experts)
        self._spectator.round_ends(domain.name, report)

    def _examine(
        self, domain: str, digest: str, journal: Journal, examples: DomainExamples, earlier: Mapping[str, Rounds]
    ) -> DomainReport:
        """Measures every domain so far, and writes what training this one did."""
        settings = self._recipe.settings
        examiner = Examiner(
            self._base, self._held_out, max_tokens=settings.training.max_pass_tokens, workers=self._workers
        )
        base_loss = examiner.loss(domain, None)
        known = read_report_of(report_path(self._store, "forgetting"), ForgettingReport, earlier)
        losses = examiner.losses_by_mode(self._frozen.stacks, self._policy)
        self._write("forgetting", add_row(known, domain, base_loss, losses))
        context = Context(settings.training.context, own=self._frozen.stacks[domain], earlier=earlier)
        rounds = journal.rounds(with_stacks=False)
        report = DomainReport(
            domain=domain,
            recipe_digest=digest,
            train_examples=len(examples.train),
            held_out_examples=len(examples.held_out),
            too_long=examples.too_long,
            base_loss=base_loss,
            context_loss=rounds[0].start_loss,
            loss=examiner.loss(domain, context.for_validation()),
            rounds=rounds,
            experts=journal.experts(1),
            seconds=round(sum(of_round.seconds for of_round in rounds), 1),
        )
        self._write(domain, report)
        return report

    def _is_registered(self, domain: str, digest: str) -> bool:
        """Whether the store's stacks of this domain are those of the recipe."""
        with closing(StackRegistry.open(self._store)) as registry:
            entries = [entry for entry in registry.manifest.domains if entry.name == domain]
            return bool(entries) and all(registry.header(stack).recipe_digest == digest for stack in entries[0].stacks)

    def _write(self, name: str, report: object) -> None:
        if self._workers.is_first:
            write_report(report_path(self._store, name), report)


def stack_config(section: StackSection) -> MoeLoraConfig:
    """The shape of a recipe's stacks."""
    return MoeLoraConfig(section.num_experts, section.rank, section.top_k, section.alpha)
