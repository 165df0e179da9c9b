"""Makes a recipe's records into what a router is to learn. Knows records and outcomes, no features.

A prompt is one that a domain trains on; what the recipe holds out stays out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from training.data.preparation import PreparedData
from training.discovery.combinations import Outcome
from training.discovery.outcomes import StoredOutcomes, read_outcomes
from training.discovery.prompts import prompt_sha256
from training.discovery.targets import positive_row, target_row
from training.errors import DiscoveryInvalid
from training.router.prompts import RouterPrompts, labelled_prompts
from training.router.target_kind import TargetKind

Labelled = tuple[str, str]  # text, label


@dataclass(frozen=True, slots=True, eq=False)
class ChosenPrompts:
    """The prompts to learn from, where their targets come from, and those that were not searched, with their labels."""

    kind: TargetKind
    prompts: RouterPrompts
    unsearched: RouterPrompts


def outcomes_to_learn(store: Path, wanted: TargetKind | None) -> StoredOutcomes | None:
    """The store's outcomes, if they are wanted, or if nothing is said and they are there.

    Raises DiscoveryInvalid if they are wanted and not there, or if they are there and not of the store's stacks.
    """
    if wanted is TargetKind.LABELS:
        return None
    outcomes = read_outcomes(store)
    if outcomes is None and wanted is TargetKind.DISCOVERED:
        raise DiscoveryInvalid(f"store {store} has no outcomes: run brainstacks-train discover, or learn the labels")
    return outcomes


def choose_prompts(
    data: PreparedData, domains: Sequence[str], *, prompts_per_domain: int, outcomes: StoredOutcomes | None
) -> ChosenPrompts:
    """The first training prompts of each of the domains, with discovered targets if there are outcomes."""
    labelled = [(record.prompt, name) for name in domains for record in data.domains[name].train[:prompts_per_domain]]
    if outcomes is None:
        return ChosenPrompts(TargetKind.LABELS, labelled_prompts(labelled, domains), labelled_prompts([], domains))
    return _discovered(labelled, tuple(domains), outcomes)


def _discovered(labelled: Sequence[Labelled], domains: tuple[str, ...], outcomes: StoredOutcomes) -> ChosenPrompts:
    """A prompt with several answers has several outcomes, and is there once for each."""
    missing = [name for name in domains if name not in outcomes.domains]
    if missing:
        raise DiscoveryInvalid(
            f"the domains {missing} were not searched: run brainstacks-train discover again, or learn the labels"
        )
    found: dict[tuple[str, str], list[Outcome]] = {}
    for stored in outcomes.outcomes:
        found.setdefault((stored.prompt_sha256, stored.label), []).append(stored.outcome)
    unique = {(prompt_sha256(text), label): text for text, label in labelled}
    rows = [(text, label, outcome) for (sha, label), text in unique.items() for outcome in found.get((sha, label), ())]
    if not rows:
        raise DiscoveryInvalid("no training prompt has an outcome: run brainstacks-train discover again")
    prompts = RouterPrompts(
        domains=domains,
        texts=[text for text, _, _ in rows],
        labels=[label for _, label, _ in rows],
        targets=torch.tensor([target_row(outcome, label=label, domains=domains) for _, label, outcome in rows]),
        positive=torch.tensor([positive_row(outcome, domains) for _, _, outcome in rows]),
    )
    unsearched = [(text, label) for (sha, label), text in unique.items() if (sha, label) not in found]
    return ChosenPrompts(TargetKind.DISCOVERED, prompts, labelled_prompts(unsearched, domains))
