"""What a discovery writes down for people and figures, and how it is counted. Knows outcomes, no model and no store.

Losses are in nats per answer token. Letters: N prompts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.discovery.combinations import BASE, BASE_NAME, DomainName, Outcome, name_combination
from training.discovery.prompts import LabelledExample, LabelledExamples
from training.seeds import derive_seed

REPORT_NAME = "discovery"
MODES = (BASE_NAME, "label", "ungated", "best")
RESAMPLES = 2000
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """What an outcome depends on beside the stacks."""

    search: str
    threshold: float
    soft_domains: tuple[DomainName, ...]
    prompts_per_domain: int
    max_example_tokens: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts and its 95 % confidence interval: percentile bootstrap over prompts, seeded."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LossSummary:
    """The losses of N prompts with no domain, the label's, every domain at 1, and the best combination of each.

    The best combination is chosen by the very loss that is reported: it is what routing could reach at most.
    """

    token_mean: Mapping[str, float]  # mode -> mean over answer tokens
    prompt_mean: Mapping[str, float]  # mode -> mean over prompts of their mean over tokens
    saving: Mapping[str, Estimate]  # mode but best -> its loss minus the best combination's, mean over prompts


@dataclass(frozen=True, slots=True)
class LabelReport:
    """What was found for the prompts of one domain."""

    prompts: int
    cut: int  # of them, prompts that lost their end to fit
    left_out: tuple[str, ...]  # sha256 of the prompts that were not searched: their answers leave no room for them
    wins: Mapping[str, int]  # combination -> prompts whose best it is; the most frequent first
    shares: Mapping[DomainName, float]  # domain -> share of the prompts whose best combination contains it
    soft: Mapping[DomainName, int]  # soft domain -> prompts for which it is target, in the best combination or not
    losses: LossSummary


@dataclass(frozen=True, slots=True)
class DiscoveryReport:
    """One discovery."""

    base_fingerprint: str
    settings: DiscoverySettings
    stack_digests: Mapping[DomainName, tuple[str, ...]]  # of the domains searched, in the recipe's order
    labels: Mapping[DomainName, LabelReport]  # of the domains that have prompts
    losses: LossSummary  # of all prompts
    rows_measured: int
    rows_from_cache: int
    seconds: float
    outcomes_sha256: str  # of the file of outcomes that belongs to this report


def report_labels(
    data: LabelledExamples, outcomes: Sequence[Outcome], domains: Sequence[DomainName], settings: DiscoverySettings
) -> dict[DomainName, LabelReport]:
    """label -> report, of every label that has a prompt, in the order of the examples."""
    of_label: dict[DomainName, list[tuple[LabelledExample, Outcome]]] = {}
    for example, outcome in zip(data.examples, outcomes, strict=True):
        of_label.setdefault(example.label, []).append((example, outcome))
    return {
        label: LabelReport(
            prompts=len(pairs),
            cut=sum(example.is_cut for example, _ in pairs),
            left_out=data.left_out[label],
            wins=count_wins([outcome for _, outcome in pairs], domains),
            shares={name: sum(name in outcome.best for _, outcome in pairs) / len(pairs) for name in domains},
            soft={name: sum(name in outcome.soft for _, outcome in pairs) for name in settings.soft_domains},
            losses=summarise_losses([example for example, _ in pairs], [outcome for _, outcome in pairs], domains),
        )
        for label, pairs in of_label.items()
    }


def count_wins(outcomes: Sequence[Outcome], domains: Sequence[DomainName]) -> dict[str, int]:
    """combination -> how often it is best; the most frequent first, then by name."""
    counts = Counter(name_combination(outcome.best, domains) for outcome in outcomes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarise_losses(
    examples: Sequence[LabelledExample], outcomes: Sequence[Outcome], domains: Sequence[DomainName]
) -> LossSummary:
    """The losses of these prompts in the four modes. Every outcome has the base, the singles and the whole measured."""
    everything = frozenset(domains)
    losses = np.array(
        [
            [outcome.losses[mode] for mode in (BASE, frozenset({example.label}), everything, outcome.best)]
            for example, outcome in zip(examples, outcomes, strict=True)
        ]
    )  # (N, 4)
    tokens = np.array([example.example.answer_length for example in examples])  # (N,)
    of_mode = dict(zip(MODES, losses.T, strict=True))
    return LossSummary(
        token_mean={mode: float(np.average(values, weights=tokens)) for mode, values in of_mode.items()},
        prompt_mean={mode: float(values.mean()) for mode, values in of_mode.items()},
        saving={mode: estimate_mean(of_mode[mode] - of_mode["best"]) for mode in MODES if mode != "best"},
    )


def estimate_mean(values: Numbers) -> Estimate:
    """(N,) -> their mean and its 95 % percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    The same values in the same order give the same interval.
    """
    generator = np.random.default_rng(derive_seed("bootstrap", len(values)))
    # By how often each value is drawn: the same as drawing them, and one product.
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)  # (R, N)
    low, high = np.percentile(counts @ values / len(values), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
