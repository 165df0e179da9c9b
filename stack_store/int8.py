"""Halves a stack's bytes: int8 values with one float32 scale per row. Knows matrices, not stacks.

Legend: N rows, W columns, P column blocks (one per projection) with a scale of their own in each row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 127


def quantise_rows(values: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N, W), widths of P blocks that add up to W -> (N, W) int8 and (N, P) float32.

    A value comes back within half a scale, the scale being the block's largest magnitude in that row / 127.
    """
    blocks = values.float().split_with_sizes(list(widths), dim=1)
    scales = torch.stack([block.abs().amax(dim=1) for block in blocks], dim=1) / LARGEST
    # A row of zeros has scale 0; dividing it by 1 keeps it zero.
    divisors = torch.where(scales == 0, 1.0, scales)
    rounded = [(block / divisors[:, [i]]).round().clamp(-LARGEST, LARGEST) for i, block in enumerate(blocks)]
    return torch.cat(rounded, dim=1).to(torch.int8), scales


def dequantise_rows(values: Tensor, scales: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(N, W) int8, (N, P) float32 -> (N, W) in dtype."""
    restored = torch.empty(values.shape, dtype=dtype)
    blocks = zip(
        restored.split_with_sizes(list(widths), dim=1), values.split_with_sizes(list(widths), dim=1), strict=True
    )
    for i, (target, block) in enumerate(blocks):
        target.copy_(block.float() * scales[:, [i]])
    return restored
