"""Turns a trained stack into a stack file, and a stack file into what later training computes with.

The file holds B outside the protected directions, also after rounding. What trains beside a frozen stack, and what is
reported of it, is read back from its file: so training sees what serving will see.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.model.base import Base
from engine.model.delta_recorder import ProjectionKey
from engine.model.moe_lora import ServingStack, serving_stack
from engine.model.training_form import MoeLoraStack
from stack_store.format import ProjectionTensors, StackHeader, pack_groups, read_stack, unpack_projections, write_stack
from training.null_space import fold
from training.protected_space import ProtectedSpace
from training.recipe import StackSection
from training.rounding import quantise_outside


def write_frozen(
    base: Base,
    stack: MoeLoraStack,
    protected: ProtectedSpace | None,
    path: Path,
    *,
    domain: str,
    round: int,
    section: StackSection,
    recipe_digest: str,
) -> None:
    """Writes a trained stack, folded, in the store's format."""
    config = stack.config
    header = StackHeader(
        base_fingerprint=base.fingerprint,
        geometry=base.geometry,
        num_experts=config.num_experts,
        rank=config.rank,
        top_k=config.top_k,
        scale=config.scale,
        domain=domain,
        round=round,
        recipe_digest=recipe_digest,
        null_space_folded=protected is not None and any(basis.shape[1] for basis in protected.bases.values()),
        weights=section.weights,
        kind=section.kind,
    )
    projections = stack.projections(base.geometry.num_layers)
    if protected is not None:
        projections = {key: _folded(tensors, protected.bases[key], section) for key, tensors in projections.items()}
    on_host = {key: _to_host(tensors) for key, tensors in projections.items()}
    write_stack(path, header, pack_groups(header, on_host))


def load_frozen(base: Base, paths: Iterable[Path]) -> tuple[ServingStack, ...]:
    """Stack files as serving computes them, on the base's device and in its dtype."""
    stacks = (read_stack(path, dtype=base.dtype) for path in paths)
    return tuple(serving_stack(s.header, s.groups, dtype=base.dtype, device=base.device) for s in stacks)


def stored_b(paths: Iterable[Path]) -> Mapping[ProjectionKey, Tensor]:
    """(layer, projection) -> (C, O) float32: the B of all the files, as they are stored, below one another."""
    rows: dict[ProjectionKey, list[Tensor]] = {}
    for path in paths:
        for key, tensors in unpack_projections(read_stack(path, dtype=torch.float32)).items():
            rows.setdefault(key, []).append(_rank_rows(tensors.b))
    return {key: torch.cat(parts) for key, parts in rows.items()}


def _folded(tensors: ProjectionTensors, directions: Tensor, section: StackSection) -> ProjectionTensors:
    if not directions.shape[1]:
        return tensors
    directions = directions.to(tensors.b.device)
    rows = quantise_outside(fold(_rank_rows(tensors.b), directions), directions, section.weights)
    return replace(tensors, b=rows.view(tensors.b.shape[0], -1, rows.shape[1]).transpose(1, 2).contiguous())


def _rank_rows(b: Tensor) -> Tensor:
    """(E, O, R) -> (E*R, O)."""
    return b.transpose(1, 2).reshape(-1, b.shape[1])


def _to_host(tensors: ProjectionTensors) -> ProjectionTensors:
    return ProjectionTensors(a=tensors.a.cpu(), b=tensors.b.cpu(), gate=tensors.gate.cpu())
