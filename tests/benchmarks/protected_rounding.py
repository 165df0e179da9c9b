"""Measures the energy that storing puts back inside the protected directions: the evidence behind `quantise_outside`.

python -m tests.benchmarks.protected_rounding

Random B of 64 rank rows, random directions: their number as a share of the outputs. `nearest` rounds each value by
itself; `loaded bf16` is what an int8 stack becomes on a base that computes in bfloat16. Single thread.
"""

import json
import time
from typing import Any

import torch
from torch import Tensor

from stack_store.int8 import dequantise_rows, quantise_rows
from training.null_space import fold, protected_energy
from training.rounding import quantise_outside

WIDTHS = (192, 576, 1536)
SHARES = (1 / 8, 1 / 7, 1 / 6, 1 / 5, 1 / 4)
RANK_ROWS = 64


def main() -> None:
    """Prints one line per shape and format, and all as JSON."""
    torch.set_num_threads(1)
    rows = [row for width in WIDTHS for share in SHARES for row in measure(width, round(share * width))]
    print("protected energy / error energy, of the total")
    for row in rows:
        print(
            "  ".join(f"{name} {value:.2g}" if isinstance(value, float) else str(value) for name, value in row.items())
        )
    print(json.dumps(rows))


def measure(width: int, num_directions: int) -> list[dict[str, Any]]:
    """float32, bf16 and int8 of one random stack."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, num_directions, generator=generator)).Q
    b = fold(torch.randn(RANK_ROWS, width, generator=generator) * 0.02, directions)
    shape = f"O={width} K={num_directions}"
    rows: list[dict[str, Any]] = [{"shape": shape, "format": "float32", "energy": protected_energy(b, directions)}]
    for weights in ("bf16", "int8"):
        started = time.perf_counter()
        steered = quantise_outside(b, directions, weights)
        seconds = time.perf_counter() - started
        row = {"shape": shape, "format": weights, "seconds": seconds}
        for name, values in (("nearest", nearest(b, weights)), ("outside", steered)):
            error = float((values - b).square().sum() / b.square().sum())
            row |= {name: protected_energy(values, directions), f"{name} error": error}
        if weights == "int8":
            row["loaded bf16"] = protected_energy(steered.to(torch.bfloat16), directions)
        rows.append(row)
    return rows


def nearest(b: Tensor, weights: str) -> Tensor:
    """(C, O) -> (C, O): each value rounded by itself."""
    if weights == "bf16":
        return b.to(torch.bfloat16).float()
    return dequantise_rows(*quantise_rows(b, [b.shape[1]]), [b.shape[1]], torch.float32)


if __name__ == "__main__":
    main()
