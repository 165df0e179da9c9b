"""Records what another source adds to each projection. Knows the layout of a batch, not stacks or singular vectors.

Letters: N examples, L longest length of a batch, I in, O out. A real token is one that is not padding.
"""

import torch
from torch import Tensor

from engine.model.inject import DeltaSource
from stack_store.format import INPUT_GROUPS

ProjectionKey = tuple[int, str]  # layer, projection


class DeltaRecorder:
    """A source of deltas that adds what another one adds, and keeps each example's mean delta per projection."""

    def __init__(self, inner: DeltaSource) -> None:
        self.inner = inner
        self._real: Tensor | None = None  # (N, L, 1) bool of the running batch
        self._num_batches = 0
        self._rows: dict[ProjectionKey, list[Tensor]] = {}  # (N, O) of each batch

    def begin_batch(self, real: Tensor) -> None:
        """Before each forward: which tokens of the padded batch are real, (N, L) bool. Every example has one."""
        if real.ndim != 2 or real.dtype != torch.bool:
            raise ValueError(f"real tokens are {real.dtype} of shape {list(real.shape)}, must be bool of shape (N, L)")
        if not real.any(dim=1).all():
            raise ValueError(f"example {int(real.any(dim=1).int().argmin())} of the batch has no real token")
        self._real = real.unsqueeze(-1)
        self._num_batches += 1

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(N, L, O) or (N*L, O), and x likewise: y plus the inner source's delta."""
        # Asked for alone: as the difference of two outputs it would carry the rounding of both.
        delta = self.inner.add_delta(torch.zeros_like(y), x, layer, group, index)
        self._record(delta.detach(), (layer, INPUT_GROUPS[group][index]))
        return y + delta

    def rows(self) -> dict[ProjectionKey, Tensor]:
        """Each projection's (N, O) in float32: per example the mean over its real tokens, in the order of the batches.

        Raises ValueError, naming the projection, for one that missed a batch or got a delta that is not finite.
        """
        joined = {}
        for key, rows in self._rows.items():
            if len(rows) != self._num_batches:
                raise ValueError(f"{_name(key)} ran in {len(rows)} of {self._num_batches} batches")
            joined[key] = torch.cat(rows)
            if not torch.isfinite(joined[key]).all():
                raise ValueError(f"{_name(key)} got a delta that is not finite")
        return joined

    def _record(self, delta: Tensor, key: ProjectionKey) -> None:
        rows = self._rows.setdefault(key, [])
        if self._real is None or len(rows) == self._num_batches:
            raise ValueError(f"{_name(key)} runs without the layout of its batch: call begin_batch before each forward")
        real = self._real.to(delta.device)  # (N, L, 1)
        if delta.shape[:-1].numel() != real.numel():
            raise ValueError(f"{_name(key)} runs on {delta.shape[:-1].numel()} tokens, the layout has {real.numel()}")
        by_example = delta.float().view(*real.shape[:2], -1)  # (N, L, O)
        # Cut off, not multiplied by zero: what padding computes may be anything.
        total = torch.where(real, by_example, 0.0).sum(dim=1)
        rows.append(total / real.sum(dim=1))


def _name(key: ProjectionKey) -> str:
    return f"layer {key[0]} {key[1]}"
