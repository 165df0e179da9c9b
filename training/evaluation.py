"""Measures the loss of a composition on held-out examples: the one function behind every loss that is reported."""

from collections.abc import Sequence

import torch

from engine.model.base import Base
from engine.model.training_form import TrainingDeltas
from training.data.batching import evaluation_batches
from training.data.examples import Example
from training.loss import answer_loss_sum, pad
from training.workers import Workers


def mean_answer_loss(
    base: Base, deltas: TrainingDeltas, examples: Sequence[Example], *, max_tokens: int, workers: Workers
) -> float:
    """Token-weighted mean loss over all answer tokens, without gradient and without gate noise.

    Batches hold examples of like length, `max_tokens` each with padding; the same examples give the same batches, so a
    composition that did not change gives the same bits again.
    """
    if deltas.active is not None:
        deltas.active.eval()
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    # Not inference_mode: what it caches in the base could not take part in a later backward.
    with torch.no_grad():
        for batch in workers.mine(evaluation_batches(examples, max_tokens=max_tokens)):
            loss, tokens = answer_loss_sum(base, deltas, pad(batch, base.device))
            total += torch.tensor([loss.item(), tokens], dtype=torch.float64)
    total = workers.sum(total)
    return (total[0] / total[1]).item()
