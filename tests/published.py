"""Writes random stores in the format of the paper's own code, and computes its formulas the slow way from the files.

Legend: E experts, R rank, I in features, O out features, T tokens, H hidden size, C hidden size of the router.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stack_store.format import PROJECTIONS, Geometry

PREFIXES = ("model.language_model", "language_model.model", "model")
VISION_PREFIX = {
    "model.language_model": "model.vision_tower.vision_model",
    "language_model.model": "vision_tower.vision_model",
    "model": "model.vision_tower",
}
NUM_VISION_LAYERS = 2
ROUTER_WIDTH = 24


def parent_of(projection: str) -> str:
    return "self_attn" if projection[0] in "qkvo" else "mlp"


def projection_tensors(in_features: int, out_features: int, generator: torch.Generator, *, rank: int) -> dict[str, Any]:
    """The ten parameters of one wrapped projection."""

    def draw(size: float, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    tensors = {"router.weight": draw(1.0, 4, in_features), "noise_linear.weight": draw(1.0, 4, in_features)}
    for expert in range(4):
        tensors[f"experts.{expert}.A.weight"] = draw(0.05, rank, in_features)
        tensors[f"experts.{expert}.B.weight"] = draw(0.05, out_features, rank)
    return tensors


def published_stack(
    geometry: Geometry,
    *,
    seed: int,
    prefix: str = "model",
    dtype: torch.dtype = torch.float32,
    vision: bool = False,
    rank: int = 16,
) -> dict[str, Any]:
    """The flat dict of one stack file."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{prefix}.layers.{layer}.{parent_of(name)}.{name}.active_stack.{key}": tensor.to(dtype)
        for layer in range(geometry.num_layers)
        for name in PROJECTIONS
        for key, tensor in projection_tensors(*geometry.shapes[name], generator, rank=rank).items()
    }
    if vision:
        state |= {
            f"{VISION_PREFIX[prefix]}.encoder.layers.{layer}.self_attn.{name}.active_stack.{key}": tensor.to(dtype)
            for layer in range(NUM_VISION_LAYERS)
            for name in ("q_proj", "k_proj", "v_proj")
            for key, tensor in projection_tensors(32, 32, generator, rank=rank).items()
        }
    return state


class PublishedRouterModule(nn.Module):
    """The published network's parameters under their published names, for what torch makes of state_dict()."""

    def __init__(self, token_dim: int, num_domains: int) -> None:
        super().__init__()
        width = ROUTER_WIDTH
        self.token_proj = nn.Linear(token_dim, width)
        self.token_ln, self.ctx_ln, self.global_ln = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.domain_queries = nn.Parameter(torch.empty(num_domains, width))
        self.global_query = nn.Parameter(torch.empty(width))
        self.ff = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(width), nn.Linear(width, width)
        )
        self.out = nn.Linear(width, 1)
        self.log_temperature = nn.Parameter(torch.tensor(0.0))


def published_router(domains: Sequence[str], token_dim: int, *, log_temperature: float = 0.3) -> dict[str, Any]:
    """The content of a router file; every parameter is random, so that none can be taken for another."""
    module = PublishedRouterModule(token_dim, len(domains))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        module.log_temperature.fill_(log_temperature)
    return {
        "state_dict": module.state_dict(),
        "domain_names": list(domains),
        "token_dim": token_dim,
        "n_domains": len(domains),
        "version": "reasoning_aware",
        "chat_floor": 0.3,
        "gate_threshold": 0.15,
    }


@dataclass
class PublishedFiles:
    """A published store in memory. A test changes what it likes and then writes it."""

    model: str
    geometry: Geometry
    stacks: dict[str, list[Any]]  # domain -> content of each round's file
    router: Any
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifest = {
            "model": self.model,
            "domains": [
                {
                    "name": name,
                    "dataset": "['some/dataset']",
                    "num_inner_stacks": len(rounds),
                    "stack_files": [f"BrainStacks_tiny/{name}/stack_{i}.pt" for i in range(1, len(rounds) + 1)],
                    "final_val_loss": 1.5,
                    "val_losses_per_round": [2.0, 1.5],
                    "time_min": 3.2,
                }
                for name, rounds in self.stacks.items()
            ],
            "total_stacks": sum(len(rounds) for rounds in self.stacks.values()),
        }

    def write(self, folder: Path, *, stacks_under: str = "stacks") -> Path:
        """The folder as it was released: stacks by domain, not where the manifest recorded them."""
        for name, rounds in self.stacks.items():
            (folder / stacks_under / name).mkdir(parents=True, exist_ok=True)
            for index, content in enumerate(rounds, start=1):
                torch.save(content, folder / stacks_under / name / f"stack_{index}.pt")
        torch.save(self.router, folder / "meta_router.pt")
        (folder / "manifest.json").write_text(json.dumps(self.manifest))
        return folder


def published_files(model: str, geometry: Geometry, **stack: Any) -> PublishedFiles:
    """Two rounds of chat and of math, one of code; the router has the domains in another order."""
    rounds = {"chat": 2, "code": 1, "math": 2}
    seeds = iter(range(100))
    stacks = {
        name: [published_stack(geometry, seed=next(seeds), **stack) for _ in range(count)]
        for name, count in rounds.items()
    }
    router = published_router(["math", "chat", "code"], geometry.shapes["q_proj"][0])
    return PublishedFiles(model, geometry, stacks, router)


def slow_published_delta(x: Tensor, parameters: Mapping[str, Tensor], *, top_k: int = 2, scale: float = 4.0) -> Tensor:
    """(I,) -> (O,): the published stack for one token, one expert after the other, weights read through bfloat16."""
    weights = {name: tensor.bfloat16().double() for name, tensor in parameters.items()}
    x = x.double()
    logits = [float(row @ x) for row in weights["router.weight"]]
    chosen = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:top_k]
    gates = torch.tensor([logits[expert] for expert in chosen], dtype=torch.float64).softmax(0)
    delta = torch.zeros(len(weights["experts.0.B.weight"]), dtype=torch.float64)
    for gate, expert in zip(gates, chosen, strict=True):
        delta += gate * (weights[f"experts.{expert}.B.weight"] @ (weights[f"experts.{expert}.A.weight"] @ x))
    return (scale * delta).float()


def slow_published_scores(router: Mapping[str, Any], features: Tensor) -> dict[str, float]:
    """(T, H) -> domain -> sigmoid score, by the published network: padded on the right, masked by -1e9."""
    state = {name: tensor.double() for name, tensor in router["state_dict"].items()}
    padded = torch.cat([features.double(), torch.zeros(3, features.shape[1], dtype=torch.float64)])
    mask = torch.arange(len(padded)) < len(features)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def pool(query: Tensor) -> Tensor:
        return (tokens @ query).masked_fill(~mask, -1e9).softmax(0) @ tokens

    tokens = norm("token_ln", linear("token_proj", padded))  # (T + 3, C)
    shared = norm("global_ln", pool(state["global_query"]))  # (C,)
    temperature = state["log_temperature"].exp().clamp(0.3, 3.0)
    scores = {}
    for name, query in zip(router["domain_names"], state["domain_queries"], strict=True):
        fused = torch.cat([norm("ctx_ln", pool(query)), shared])  # (2C,)
        hidden = gelu(linear("ff.4", norm("ff.3", gelu(linear("ff.0", fused)))))
        scores[name] = float((linear("out", hidden) / temperature).sigmoid().squeeze())
    return scores
