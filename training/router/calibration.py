"""Measures whether scores are probabilities. Knows scores and what is right; no network.

Legend: N scores, M bins.
"""

import torch
from torch import Tensor

from training.router.reports import Calibration, ReliabilityBin

NUM_BINS = 15


def calibration_of(scores: Tensor, positive: Tensor, *, num_bins: int = NUM_BINS) -> Calibration:
    """(N,) scores in [0, 1], (N,) bool -> M bins of equal width. ValueError without a score.

    The error is the mean distance of a bin's positive share from its mean score, each bin weighted by its scores:
    Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section "Calibration
    measures", for binary scores; Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    if not len(scores):
        raise ValueError("a calibration needs a score")
    edges = torch.arange(num_bins + 1, dtype=torch.float64) / num_bins  # (M + 1,)
    scores = scores.double()
    places = torch.bucketize(scores, edges[1:-1])  # (N,); a score on an edge is in the bin below it
    bins = tuple(
        _bin(edges[place].item(), edges[place + 1].item(), scores[places == place], positive[places == place])
        for place in range(num_bins)
    )
    distances = [
        of_bin.num_scores * abs(of_bin.positive_share - of_bin.mean_score)
        for of_bin in bins
        if of_bin.positive_share is not None and of_bin.mean_score is not None
    ]
    return Calibration(expected_error=sum(distances) / len(scores), bins=bins)


def _bin(lower: float, upper: float, scores: Tensor, positive: Tensor) -> ReliabilityBin:
    if not len(scores):
        return ReliabilityBin(lower, upper, 0, None, None)
    return ReliabilityBin(lower, upper, len(scores), scores.mean().item(), positive.double().mean().item())
