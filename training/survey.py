"""Runs a frozen domain over its own held-out examples and keeps its deltas and its gates' choices. Knows no report."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.model.base import Base
from engine.model.delta_recorder import DeltaRecorder, ProjectionKey
from engine.model.inject import injected
from engine.model.moe_lora import StackPack
from engine.model.training_form import TrainingDeltas
from training.data.batching import evaluation_batches
from training.data.examples import Example
from training.loss import hidden_states, pad
from training.null_space import leading_directions
from training.protected_space import name_of
from training.seeds import derive_seed


def mean_deltas(
    base: Base, pack: StackPack, examples: Sequence[Example], *, max_tokens: int
) -> dict[ProjectionKey, Tensor]:
    """(layer, projection) -> (N, O): per example the mean over its tokens of what the stacks add."""
    deltas = TrainingDeltas()
    deltas.use_frozen(pack)
    recorder = DeltaRecorder(deltas)
    with torch.no_grad(), injected(base.sites, recorder):
        for batch in evaluation_batches(examples, max_tokens=max_tokens):
            layout = pad(batch, base.device)
            recorder.begin_batch(layout.real)
            hidden_states(base, deltas, layout)
    return recorder.rows()


def claimed_directions(
    rows: Mapping[ProjectionKey, Tensor], *, count: int, seed: int
) -> tuple[dict[ProjectionKey, Tensor], dict[ProjectionKey, Tensor]]:
    """The leading directions (O, K) of each projection's deltas, and their singular values (K,)."""
    found = {
        key: leading_directions(deltas, count, seed=derive_seed(seed, name_of(key))) for key, deltas in rows.items()
    }
    return {key: v.cpu() for key, (v, _) in found.items()}, {key: s.cpu() for key, (_, s) in found.items()}


def expert_shares(
    base: Base, deltas: TrainingDeltas, examples: Sequence[Example], *, max_tokens: int
) -> dict[str, tuple[float, ...]]:
    """`layer.projection` -> each expert's share of the active stack's assignments over all tokens, without noise."""
    assert deltas.active is not None
    deltas.active.eval()
    totals: dict[ProjectionKey, Tensor] = {}
    with torch.no_grad():
        for batch in evaluation_batches(examples, max_tokens=max_tokens):
            layout = pad(batch, base.device)
            hidden_states(base, deltas, layout)
            for key, shares in deltas.active.expert_shares().items():
                totals[key] = totals.get(key, torch.zeros_like(shares)) + shares * layout.real.sum()
    return {name_of(key): tuple((total / total.sum()).tolist()) for key, total in totals.items()}
