"""Measures how well one number tells two kinds of things apart. Knows numbers only.

Legend: N things of one kind, P of the other, K points of a curve.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.router.reports import RocCurve

Floats = NDArray[np.float64]


def area_under_roc(lower: Sequence[float], higher: Sequence[float]) -> float | None:
    """The probability that one of `higher` is above one of `lower`, ties counting half; None if one kind is missing.

    The Mann-Whitney U statistic as a share of all pairs (Hanley and McNeil 1982), in O(n log n).
    """
    if not len(lower) or not len(higher):
        return None
    low = np.sort(np.asarray(lower, dtype=np.float64))
    below = np.searchsorted(low, higher, side="left")  # (P,): how many of `lower` each is above
    not_above = np.searchsorted(low, higher, side="right")
    return float((below + not_above).sum() / 2 / (len(lower) * len(higher)))


def roc_curve(lower: Sequence[float], higher: Sequence[float]) -> RocCurve:
    """The curve of telling `lower` by lying below a threshold. ValueError if one kind is missing."""
    area = area_under_roc(lower, higher)
    if area is None:
        raise ValueError(f"a curve needs both kinds, not {len(lower)} and {len(higher)}")
    # Below its smallest value nothing lies, below infinity everything; in between each value is a threshold.
    thresholds = np.append(np.unique(np.concatenate([lower, higher])), np.inf)  # (K,)
    return RocCurve(false_alarms=_shares_below(higher, thresholds), caught=_shares_below(lower, thresholds), area=area)


def share_below(values: Sequence[float], threshold: float) -> float:
    """Of the values, the share below the threshold."""
    return float(np.mean(np.asarray(values) < threshold))


def largest_threshold(values: Sequence[float], *, max_share: float) -> float:
    """The largest number below which at most that share of the values lies; the share is below 1."""
    if not len(values) or not 0.0 <= max_share < 1.0:
        raise ValueError(f"no threshold for a share of {max_share} of {len(values)} values")
    return float(np.sort(np.asarray(values))[_floor(max_share * len(values))])


def _shares_below(values: Sequence[float], thresholds: Floats) -> tuple[float, ...]:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return tuple((np.searchsorted(ordered, thresholds, side="left") / len(ordered)).tolist())


def _floor(number: float) -> int:
    """0.29 * 100 is 28.999999999999996, and means 29."""
    return int(np.floor(number + 1e-9))
