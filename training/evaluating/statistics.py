"""Confidence intervals and paired tests over records. Knows numbers and a seed, nothing of models.

Legend: N records of a group, G groups, R resamples. A group is a domain; the statistic over several groups is the
plain mean over them of each group's token-weighted mean, and resampling and sign flipping stay inside the groups.

Intervals of losses are percentile bootstraps over records (Efron and Tibshirani 1993, section 13.3), those of shares
Wilson's (1927). Tests are two-sided and paired: sign flips of the records' differences for losses (Fisher's
randomisation test, p with the observed assignment counted in: Phipson and Smyth 2010), the exact sign test on the
records that differ for shares (McNemar's test in its exact form). Nothing is corrected for making many comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Z_95 = 1.959963984540054  # the normal's 97.5 % quantile

Array = NDArray[np.float64]
ModeName = str


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """The records of one domain: answer tokens, and the summed loss of each in each mode, in nats."""

    tokens: Array  # (N,)
    sums: Mapping[ModeName, Array]  # (N,) each


def loss_intervals(groups: Sequence[GroupLosses], *, seed: int) -> dict[ModeName, Interval]:
    """Each mode's token-weighted mean loss, averaged over the groups."""
    resampled = _resampled_means(groups, seed)
    return {mode: _interval(_mean(groups, mode), values) for mode, values in resampled.items()}


def loss_difference(groups: Sequence[GroupLosses], mode: ModeName, other: ModeName, *, seed: int) -> Interval:
    """How much more a mode loses than another on the same records; the resamples are the same for both."""
    resampled = _resampled_means(groups, seed)
    return _interval(_mean(groups, mode) - _mean(groups, other), resampled[mode] - resampled[other])


def loss_ratio(groups: Sequence[GroupLosses], mode: ModeName, other: ModeName, *, seed: int) -> Interval:
    """A mode's loss over another's, both averaged over the groups first."""
    resampled = _resampled_means(groups, seed)
    return _interval(_mean(groups, mode) / _mean(groups, other), resampled[mode] / resampled[other])


def loss_p_value(groups: Sequence[GroupLosses], mode: ModeName, other: ModeName, *, seed: int) -> float:
    """The chance of a difference at least as large if the two modes' losses of a record could change places."""
    generator = np.random.default_rng(seed)
    flipped = np.zeros(RESAMPLES)
    for group in groups:
        differences = (group.sums[mode] - group.sums[other]) / group.tokens.sum() / len(groups)  # (N,)
        signs = generator.choice([-1.0, 1.0], size=(RESAMPLES, len(differences)))
        flipped += signs @ differences
    observed = abs(_mean(groups, mode) - _mean(groups, other))
    # Equal sums that were added in another order are equal.
    at_least = np.count_nonzero(np.abs(flipped) >= observed - 1e-12 * max(observed, 1.0))
    return (1 + int(at_least)) / (1 + RESAMPLES)


def share_interval(values: Array) -> Interval:
    """(N,) of 0 and 1 -> the share of ones, with Wilson's interval, which is not empty at 0 and at 1 either."""
    _require_binary(values)
    count, share = len(values), float(values.mean())
    centre = (share + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 / (1 + Z_95**2 / count) * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def share_difference(values: Array, others: Array, *, seed: int) -> Interval:
    """(N,), (N,) of 0 and 1 on the same records -> the difference of the shares, bootstrapped over records."""
    _require_binary(values, others)
    differences = values - others
    weights = _resample_counts(np.random.default_rng(seed), len(differences))
    return _interval(float(differences.mean()), weights @ differences / len(differences))


def share_p_value(values: Array, others: Array) -> float:
    """The exact sign test: the chance of a split at least as uneven among the records on which the two differ."""
    _require_binary(values, others)
    wins, losses = int((values > others).sum()), int((values < others).sum())
    differing = wins + losses
    tail = sum(math.comb(differing, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**differing)


def _mean(groups: Sequence[GroupLosses], mode: ModeName) -> float:
    return float(np.mean([group.sums[mode].sum() / group.tokens.sum() for group in groups]))


def _resampled_means(groups: Sequence[GroupLosses], seed: int) -> dict[ModeName, Array]:
    """mode -> (R,). Every mode sees the same resamples, so differences and ratios are paired."""
    generator = np.random.default_rng(seed)
    totals = {mode: np.zeros(RESAMPLES) for mode in groups[0].sums}
    for group in groups:
        counts = _resample_counts(generator, len(group.tokens))  # (R, N)
        tokens = counts @ group.tokens  # (R,)
        for mode, sums in group.sums.items():
            totals[mode] += counts @ sums / tokens / len(groups)
    return totals


def _resample_counts(generator: np.random.Generator, num_records: int) -> Array:
    """(R, N): how often each resample draws each record."""
    return generator.multinomial(num_records, np.full(num_records, 1 / num_records), size=RESAMPLES).astype(np.float64)


def _interval(value: float, resampled: Array) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _require_binary(*arrays: Array) -> None:
    for values in arrays:
        if not len(values) or not np.isin(values, (0.0, 1.0)).all():
            raise ValueError(f"shares are of values 0 and 1, got {values.tolist()}")
