"""Makes random stacks, and computes them the slow, obviously right way."""

from dataclasses import replace

import torch
from torch import Tensor

from engine.model.moe_lora import MoeLoraConfig, ServingStack, serving_stack
from stack_store.format import PROJECTIONS, Geometry, ProjectionTensors, StackHeader, pack_groups

CPU = torch.device("cpu")
Projections = dict[tuple[int, str], ProjectionTensors]


def random_projections(geometry: Geometry, config: MoeLoraConfig, *, seed: int, size: float = 0.1) -> Projections:
    """Random weights for every projection, none of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    e, r = config.num_experts, config.rank
    return {
        (layer, name): ProjectionTensors(a=draw(e, r, i), b=draw(e, o, r), gate=draw(e, i) * 10)
        for layer in range(geometry.num_layers)
        for name in PROJECTIONS
        for i, o in [geometry.shapes[name]]
    }


def header_for(
    geometry: Geometry, config: MoeLoraConfig, *, fingerprint: str = "test-base", domain: str = "math", round: int = 1
) -> StackHeader:
    """The header of a bf16 stack file of that shape."""
    return StackHeader(
        base_fingerprint=fingerprint,
        geometry=geometry,
        num_experts=config.num_experts,
        rank=config.rank,
        top_k=config.top_k,
        scale=config.scale,
        domain=domain,
        round=round,
        recipe_digest="0" * 64,
        null_space_folded=False,
        weights="bf16",
    )


def to_serving(
    geometry: Geometry,
    config: MoeLoraConfig,
    projections: Projections,
    *,
    dtype: torch.dtype = torch.float32,
    domain: str = "math",
    round: int = 1,
    panelled: bool = False,
    device: torch.device = CPU,
) -> ServingStack:
    """The serving form of those weights."""
    header = header_for(geometry, config, domain=domain, round=round)
    groups = pack_groups(header, projections)
    return serving_stack(header, groups, dtype=dtype, device=device, panelled=panelled)


def random_serving_stack(geometry: Geometry, *, seed: int = 0, top_k: int = 2, zero: bool = False) -> ServingStack:
    """A small frozen stack with random weights; with `zero` its B is zero, so it changes nothing."""
    config = MoeLoraConfig(num_experts=4, rank=2, top_k=top_k)
    projections = random_projections(geometry, config, seed=seed, size=0.05)
    if zero:
        projections = {key: replace(tensors, b=torch.zeros_like(tensors.b)) for key, tensors in projections.items()}
    return to_serving(geometry, config, projections)


def slow_delta(x: Tensor, weights: ProjectionTensors, config: MoeLoraConfig) -> Tensor:
    """(I,) -> (O,): section 3.1 of the Brainstacks paper, one token, one expert at a time."""
    logits = [float(torch.dot(x, weights.gate[e])) for e in range(config.num_experts)]
    chosen = sorted(range(config.num_experts), key=lambda e: -logits[e])[: config.top_k]
    exponentials = {e: torch.exp(torch.tensor(logits[e] - max(logits), dtype=torch.float64)) for e in chosen}
    total = sum(exponentials.values())
    delta = torch.zeros(weights.b.shape[1], dtype=torch.float64)
    for e in chosen:
        delta += exponentials[e] / total * (weights.b[e].double() @ (weights.a[e].double() @ x.double()))
    return (config.alpha / config.rank**0.5 * delta).float()
