"""A base with a mix, the plain way: one sequence, transformers' own attention, no cache, one stack after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.base import Base, load_base
from engine.model.moe_lora import MoeLoraConfig
from stack_store.format import PROJECTIONS, ProjectionTensors
from tests.stacks import Projections

WeightedStack = tuple[MoeLoraConfig, Projections, float]


class ReferenceModel:
    """Logits and greedy tokens of one prompt under one mix."""

    def __init__(self, folder: Path | None, *, base_format: Any = "dense") -> None:
        self.base: Base = load_base(
            None if folder is None else str(folder),
            base_format=base_format,
            dtype="float32",
            device="cpu",
            attention="eager",
        )

    def logits(self, token_ids: Sequence[int], mix: Sequence[WeightedStack]) -> Tensor:
        """T token ids -> (T, V)."""
        hooks = [site.module.register_forward_hook(_adds(mix, site.layer, site.projection)) for site in self.base.sites]
        try:
            with torch.no_grad():
                return self.base.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()

    def greedy(self, prompt_ids: Sequence[int], mix: Sequence[WeightedStack], num_tokens: int) -> list[int]:
        """The next tokens, each from a whole new forward."""
        ids = list(prompt_ids)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids, mix)[-1].argmax()))
        return ids[len(prompt_ids) :]


def _adds(mix: Sequence[WeightedStack], layer: int, projection: str) -> Any:
    assert projection in PROJECTIONS

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for config, projections, weight in mix:
            output = output + weight * dense_delta(inputs[0], projections[layer, projection], config)
        return output

    return hook


def dense_delta(x: Tensor, weights: ProjectionTensors, config: MoeLoraConfig) -> Tensor:
    """(..., I) -> (..., O): every expert computed for every token, then weighed by the gate."""
    logits = x @ weights.gate.T  # (..., E)
    largest = logits.topk(config.top_k, dim=-1).indices
    masked = torch.full_like(logits, -torch.inf).scatter(-1, largest, logits.gather(-1, largest))
    gate = masked.softmax(dim=-1)
    experts = torch.einsum("...i,eri,eor->...eo", x, weights.a, weights.b)
    return config.scale * torch.einsum("...e,...eo->...o", gate, experts)
