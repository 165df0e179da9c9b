"""What training a router writes down: frozen records for the store's `reports` folder. Computes nothing.

Shares are of prompts. Cross-entropies are binary, in nats, means over prompts and domains, against the targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from training.reports import DomainName
from training.router.target_kind import TargetKind

ROUTER_REPORT = "router"
EXTENSION_REPORT = "router_extension"


@dataclass(frozen=True, slots=True)
class DomainMetrics:
    """How well one domain's activity is predicted; None where a ratio has nothing to divide by."""

    precision: float | None
    recall: float | None
    num_positive: int


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """How well a router predicts which domains are right; shares are None where there is no such prompt.

    A domain is predicted if its raw score is above the policy's threshold (the floor would make the floor domain right
    for nothing). top1: of the prompts with a positive domain, those whose highest score is a positive domain's.
    set_match: of all prompts, those whose predicted set is the positive one exactly. A prompt with one positive domain
    is single, with several mixed; one without any counts in set_match and bce only.
    """

    top1: float | None
    set_match: float
    bce: float
    single_top1: float | None
    mixed_set_match: float | None
    num_prompts: int
    num_single: int
    num_mixed: int
    domains: Mapping[DomainName, DomainMetrics]

    @property
    def selection_score(self) -> float:
        """What the best epoch has the most of (Brainstacks paper, section 3.6).

        Without single prompts all with a positive domain count for the first term, without mixed ones all for the
        second.
        """
        top1 = self.top1 if self.single_top1 is None else self.single_top1
        set_match = self.set_match if self.mixed_set_match is None else self.mixed_set_match
        return 0.50 * (top1 or 0.0) + 0.35 * set_match - 0.15 * self.bce


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Scores in (lower, upper], those of 0 in the first bin; means are None where there is no score."""

    lower: float
    upper: float
    num_scores: int
    mean_score: float | None
    positive_share: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The reliability curve of all scores, a prompt's and a domain's each, and the expected calibration error."""

    expected_error: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class RouterEvaluation:
    """One router on the validation prompts, which also chose its best epoch."""

    label_top1: float  # share of the prompts whose highest score is their label's
    metrics: RouterMetrics
    calibration: Calibration
    best_epoch: int


@dataclass(frozen=True, slots=True)
class RocCurve:
    """For each threshold that makes a difference, the shares of both kinds that lie below it, from 0 to 1."""

    false_alarms: tuple[float, ...]  # of what should lie above
    caught: tuple[float, ...]  # of what should lie below
    area: float


@dataclass(frozen=True, slots=True)
class GapMeasure:
    """Prompts inside and outside of the domains, told apart by their highest raw score."""

    num_in_domain: int
    num_out_of_domain: int
    false_alarms: float  # share of those inside below the threshold
    caught: float  # share of those outside below it
    curve: RocCurve


@dataclass(frozen=True, slots=True)
class GapReport:
    """The threshold of the gap signal; not calibrated, and then the policy's own, without out-of-domain prompts."""

    threshold: float
    allowed_false_alarms: float
    calibration: GapMeasure | None  # validation prompts, which chose the threshold, and half of those outside
    check: GapMeasure | None  # the prompts of the records that the recipe holds out, and the other half


@dataclass(frozen=True, slots=True)
class RouterReport:
    """The store's router, first, and beside it one that learnt the labels of the same prompts."""

    targets: TargetKind  # what the store's router learnt, and what both are measured against
    num_train: int
    num_validation: int
    prompts: Mapping[DomainName, int]  # by label
    unsearched_prompts: Mapping[DomainName, int]  # without an outcome: not validated on, learnt if the recipe says so
    routers: Mapping[TargetKind, RouterEvaluation]
    gap: GapReport


@dataclass(frozen=True, slots=True)
class DomainQuality:
    """How well a router tells one domain's prompts on the validation side; None where there is nothing to divide by."""

    metrics: DomainMetrics
    auc: float | None  # the probability that a positive prompt's score is above another's
    bce: float  # of this domain's scores


@dataclass(frozen=True, slots=True)
class ExtensionReport:
    """A domain added to a router by one query, beside a router that was trained anew on the same prompts."""

    domain: DomainName
    targets: TargetKind
    num_train: int
    num_validation: int
    best_epoch: int
    extended: DomainQuality
    retrained: DomainQuality
    extended_metrics: RouterMetrics  # of all domains
    retrained_metrics: RouterMetrics
