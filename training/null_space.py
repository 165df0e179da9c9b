"""Finds the directions that deltas use, and keeps a stack out of them. Knows matrices, not models, domains or files.

Letters: N examples, O out features, K directions, Q sketch columns, C rank rows of a stack (E*R).
"""

import torch
from torch import Tensor

from engine.model.training_form import outside

OVERSAMPLING = 8  # sketch columns beyond those asked for
POWER_ITERATIONS = 4
NEGLIGIBLE = 1e-6  # of the first singular value


def leading_directions(deltas: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """(N, O) -> (O, K) and (K,) in float32: the deltas' leading right singular vectors and values, largest first.

    Not centred. K is `count` or, if that is less, the number of singular values above 1e-6 of the first. The same
    seed gives the same directions, and the global generator is not touched.
    """
    if deltas.ndim != 2 or 0 in deltas.shape:
        raise ValueError(f"deltas have shape {list(deltas.shape)}, must be (N, O) with at least one of each")
    if count < 1:
        raise ValueError(f"the number of directions must be positive, got {count}")
    if not torch.isfinite(deltas).all():
        raise ValueError("deltas hold a value that is not finite")
    rows, sketch = deltas.detach().float(), count + OVERSAMPLING
    if min(rows.shape) > 2 * sketch:
        values, directions = _randomised_svd(rows, sketch, seed)
    else:
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        directions = right.T
    rank = int((values[:count] > NEGLIGIBLE * values[0]).sum())
    return directions[:, :rank].contiguous(), values[:rank].clone()


def _randomised_svd(rows: Tensor, sketch: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, O) -> (Q,), (O, Q): Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, of the transposed matrix."""
    # Drawn on the CPU, so that every device sketches alike.
    noise = torch.randn(rows.shape[0], sketch, generator=torch.Generator().manual_seed(seed))  # (N, Q)
    basis = torch.linalg.qr(rows.T @ noise.to(rows.device)).Q  # (O, Q)
    for _ in range(POWER_ITERATIONS):
        # Made orthonormal after each half, or the small directions drown in the rounding of the large.
        left = torch.linalg.qr(rows @ basis).Q  # (N, Q)
        basis = torch.linalg.qr(rows.T @ left).Q
    within, values, _ = torch.linalg.svd((rows @ basis).T, full_matrices=False)  # (Q, Q), (Q,)
    return values, basis @ within


def project(b: Tensor, directions: Tensor) -> Tensor:
    """(C, O), (O, K) -> (C, O): b - (b V) Vᵀ in float32, differentiable (Brainstacks paper, section 3.5)."""
    return outside(b.float(), directions)


def fold(b: Tensor, directions: Tensor) -> Tensor:
    """(C, O), (O, K) -> (C, O): as `project`, for good and detached.

    Twice, because the second pass takes out what the first one's rounding left, however little of b remains.
    """
    return project(project(b.detach(), directions), directions)


def protected_energy(b: Tensor, directions: Tensor) -> float:
    """(C, O), (O, K) -> ||b V||² / ||b||², in [0, 1]: the share of b inside the directions; 0 if b is zero."""
    rows = b.detach().double()
    total = rows.square().sum()
    return min(1.0, float((rows @ directions.double()).square().sum() / total)) if total > 0 else 0.0
