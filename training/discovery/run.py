"""Runs a discovery over a recipe's training prompts and writes what it found. Knows the order of things."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.model.base import Base
from engine.model.moe_lora import ServingStack
from stack_store.registry import StackRegistry
from training.data.chat_tokens import special_tokens
from training.data.examples import Example
from training.data.preparation import prepare_data
from training.data.records import DomainName
from training.discovery.candidate_losses import RowLosses
from training.discovery.combinations import ExhaustiveSearch, GreedySearch, Outcome, Search
from training.discovery.discovery import WINDOW, CandidateLosses, Progress, find_outcomes
from training.discovery.loss_cache import LossKeys, open_loss_cache
from training.discovery.outcomes import write_outcomes
from training.discovery.prompts import LabelledExamples, label_examples
from training.discovery.report import (
    REPORT_NAME,
    DiscoveryReport,
    DiscoverySettings,
    report_labels,
    summarise_losses,
)
from training.errors import DataUnusable
from training.freezing import load_frozen
from training.journal import JOURNAL_FOLDER
from training.recipe import Recipe
from training.reports import report_path, write_report

CACHE_FILE = "discovery.sqlite"
DEFAULT_SOFT_DOMAIN = "reasoning"


@dataclass(frozen=True, slots=True, eq=False)
class FrozenDomains:
    """Domains of a store as they are computed with, and which stacks they are; both in the order of the recipe."""

    stacks: Mapping[DomainName, Sequence[ServingStack]]
    digests: Mapping[DomainName, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """The outcomes in the order of the examples, and how many losses were measured for them and how many known."""

    outcomes: Sequence[Outcome]
    rows_measured: int
    rows_from_cache: int


def discover(
    recipe: Recipe, base: Base, store: Path, *, on_progress: Callable[[Progress], None] = lambda progress: None
) -> DiscoveryReport:
    """Searches the first training prompts of each domain; writes outcomes and report. Goes on behind an earlier run.

    Raises DomainNotFound if the store lacks a domain of the recipe, DataUnusable if a domain has nothing to search.
    """
    started = time.perf_counter()
    domains = load_domains(recipe, base, store)
    settings = discovery_settings(recipe)
    data = training_examples(recipe, base, settings)
    found = search_examples(
        [labelled.example for labelled in data.examples],
        base=base,
        domains=domains,
        settings=settings,
        cache=store / JOURNAL_FOLDER / CACHE_FILE,
        max_tokens=recipe.settings.training.max_pass_tokens,
        on_progress=on_progress,
    )
    names = tuple(domains.digests)
    # Before the report, which names them: outcomes without their report are refused.
    outcomes_sha256 = write_outcomes(store, data.examples, found.outcomes, names)
    report = DiscoveryReport(
        base_fingerprint=base.fingerprint,
        settings=settings,
        stack_digests=domains.digests,
        labels=report_labels(data, found.outcomes, names, settings),
        losses=summarise_losses(data.examples, found.outcomes, names),
        rows_measured=found.rows_measured,
        rows_from_cache=found.rows_from_cache,
        seconds=round(time.perf_counter() - started, 1),
        outcomes_sha256=outcomes_sha256,
    )
    write_report(report_path(store, REPORT_NAME), report)
    return report


def search_examples(
    examples: Sequence[Example],
    *,
    base: Base,
    domains: FrozenDomains,
    settings: DiscoverySettings,
    cache: Path,
    max_tokens: int,
    window: int = WINDOW,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Found:
    """The outcomes of any examples, held-out ones too. A pass holds at most `max_tokens`; losses go to the cache."""
    with open_loss_cache(cache) as opened:
        # The same base in another number format has other losses.
        keys = LossKeys([base.fingerprint, base.base_format, str(base.dtype)], domains.digests)
        losses = CandidateLosses(RowLosses(base, domains.stacks, max_tokens=max_tokens), opened, keys)
        new_search = partial(_new_search, tuple(domains.stacks), settings)
        outcomes = find_outcomes(examples, new_search=new_search, losses=losses, window=window, on_progress=on_progress)
    return Found(outcomes, losses.rows_measured, losses.rows_from_cache)


def load_domains(recipe: Recipe, base: Base, store: Path) -> FrozenDomains:
    """The recipe's domains as the store has them. Raises DomainNotFound for one that it lacks."""
    with closing(StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)) as registry:
        entries = [registry.domain(domain.name) for domain in recipe.settings.domains]
        return FrozenDomains(
            stacks={
                entry.name: load_frozen(base, [registry.stack_path(stack) for stack in entry.stacks])
                for entry in entries
            },
            digests={entry.name: tuple(stack.digest for stack in entry.stacks) for entry in entries},
        )


def discovery_settings(recipe: Recipe) -> DiscoverySettings:
    """The recipe's settings, with the soft domains that are the default where it names none."""
    section, names = recipe.settings.discovery, [domain.name for domain in recipe.settings.domains]
    default = tuple(name for name in names if name == DEFAULT_SOFT_DOMAIN)
    return DiscoverySettings(
        search=section.search,
        threshold=section.threshold,
        soft_domains=default if section.soft_domains is None else section.soft_domains,
        prompts_per_domain=section.prompts_per_domain,
        max_example_tokens=recipe.settings.training.max_example_tokens,
    )


def training_examples(recipe: Recipe, base: Base, settings: DiscoverySettings) -> LabelledExamples:
    """The first training prompts of each domain; none that is held out. Raises DataUnusable for a domain without."""
    prepared = prepare_data(recipe, own_tokens=special_tokens(base.tokenizer))
    records = {name: of_domain.train[: settings.prompts_per_domain] for name, of_domain in prepared.domains.items()}
    data = label_examples(base.tokenizer, records, max_tokens=settings.max_example_tokens)
    for name, left_out in data.left_out.items():
        if len(left_out) == len(records[name]):
            raise DataUnusable(
                f"domain {name!r} has nothing to search: none of the answers of {len(left_out)} prompts leaves room "
                f"for its prompt within {settings.max_example_tokens} tokens"
            )
    return data


def _new_search(domains: Sequence[DomainName], settings: DiscoverySettings) -> Search:
    threshold, soft_domains = settings.threshold, settings.soft_domains
    if settings.search == "exhaustive":
        return ExhaustiveSearch(domains, threshold=threshold, soft_domains=soft_domains)
    # The whole is measured for the report, which compares with it.
    return GreedySearch(domains, threshold=threshold, soft_domains=soft_domains, also=[frozenset(domains)])
