"""Rounds folded weights for storing, so that they stay out of the protected directions. Knows matrices, not files.

Rounding each value to the nearest puts energy back: the rounding errors point anywhere, so K / O of theirs lies inside.
Here a value may become its second nearest neighbour where that cancels what others put inside: coordinate descent
over the values that can be stored, which minimises

    ||q V||² + PULL ||q - b||²

Protected energy of random stacks of 64 rank rows, O from 192 to 1536 (python -m tests.benchmarks.protected_rounding):

    K / O                  1/8             1/6             1/4
    bf16, nearest    3.3 to 3.5e-7   4.5 to 4.6e-7   6.9 to 7.1e-7
    bf16, here       at most 1e-8    at most 3e-8    at most 9e-8
    int8, nearest    5.3 to 7.9e-6  0.75 to 1.1e-5   1.1 to 1.7e-5
    int8, here       2.6 to 3.4e-7   5.0 to 6.4e-7   1.2 to 1.6e-6

So a bf16 stack keeps to 1e-6, and an int8 stack does while at most a fifth of the outputs is protected; a base that
computes in bfloat16 rounds int8 once more as it loads it, and a seventh is the most.

Letters: C rank rows, O out features, K directions, W columns of a block.
"""

from typing import Literal

import torch
from torch import Tensor

from stack_store.int8 import LARGEST
from training.null_space import protected_energy

StoredWeights = Literal["bf16", "int8"]

PULL = 0.01  # of the error itself: little, as an error outside the directions harms no other domain
ENOUGH = 1e-7  # protected energy, a tenth of what is promised
SWEEPS = 8
BLOCK = 64


def quantise_outside(b: Tensor, directions: Tensor, weights: StoredWeights) -> Tensor:
    """(C, O), (O, K) -> (C, O) float32: values that a stack file stores exactly, close to b, outside the directions.

    b is folded already. Never more energy inside than by rounding to the nearest. Each row keeps its largest
    magnitude, so that int8 storing finds the same scale.
    """
    if not torch.isfinite(b.to(torch.bfloat16)).all():
        raise ValueError(f"b holds a value that is not finite in bf16; its largest magnitude is {b.abs().max().item()}")
    unit = _unit(b.detach().float(), weights)  # (C, 1)
    wanted = b.detach().float() / unit
    rounded = wanted.to(torch.bfloat16).float() if weights == "bf16" else wanted.round()
    for _ in range(SWEEPS):
        if protected_energy(rounded * unit, directions) <= ENOUGH:
            break
        rounded = _sweep(rounded, wanted, directions, weights)
    return rounded * unit


def _unit(b: Tensor, weights: StoredWeights) -> Tensor:
    """(C, O) -> (C, 1): what each row is divided by; int8's scale, 1 for a row of zeros."""
    if weights == "bf16":
        return torch.ones_like(b[:, :1])
    scale = b.abs().amax(dim=1, keepdim=True) / LARGEST
    return torch.where(scale == 0, 1.0, scale)


def _sweep(rounded: Tensor, wanted: Tensor, directions: Tensor, weights: StoredWeights) -> Tensor:
    """(C, O) -> (C, O): one visit to every value, block by block of columns."""
    blocks = []
    inside = rounded @ directions  # (C, K)
    parts = (torch.split(rounded, BLOCK, dim=1), torch.split(wanted, BLOCK, dim=1), torch.split(directions, BLOCK))
    for values, goal, rows in zip(*parts, strict=True):  # (C, W), (C, W), (W, K)
        steps = _block_steps(values, goal, rows, inside, weights)
        inside = inside + steps @ rows
        blocks.append(values + steps)
    return torch.cat(blocks, dim=1)


def _block_steps(values: Tensor, goal: Tensor, rows: Tensor, inside: Tensor, weights: StoredWeights) -> Tensor:
    """(C, W), (C, W), (W, K), (C, K) -> (C, W): how far each value moves; columns in order, all rank rows at once."""
    below, above = (steps.T.contiguous() for steps in _neighbours(values, weights))  # (W, C) each
    gram = rows @ rows.T  # (W, W)
    error = (values - goal).T  # (W, C)
    slope = rows @ inside.T  # (W, C): half the derivative of ||q V||² by each value
    moved = torch.zeros_like(below)
    for column in range(len(rows)):
        half_slope = slope[column] + PULL * error[column]
        step = torch.where(half_slope > 0, below[column], above[column])
        change = step * (2 * half_slope + step * (gram[column, column] + PULL))
        moved[column] = torch.where(change < 0, step, 0.0)
        slope.addr_(gram[column], moved[column])
    return moved.T


def _neighbours(values: Tensor, weights: StoredWeights) -> tuple[Tensor, Tensor]:
    """The steps from each value to the next that can be stored, below (negative) and above; 0 where there is none."""
    if weights == "int8":
        # Values at the end of the range stay: they make the row's scale.
        step = (values.abs() < LARGEST).to(values.dtype)
        return -step, step
    bits = values.to(torch.bfloat16).view(torch.int16)
    outward = (bits + 1).view(torch.bfloat16).float() - values  # the next larger magnitude has the next bit pattern
    inward = (bits - 1).view(torch.bfloat16).float() - values
    # A zero has no neighbour worth having, and beyond the largest value is infinity.
    outward, inward = (torch.where((values == 0) | ~step.isfinite(), 0.0, step) for step in (outward, inward))
    return torch.minimum(outward, inward), torch.maximum(outward, inward)
