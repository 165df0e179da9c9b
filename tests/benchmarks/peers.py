"""What else computes a base with adapters: transformers' `generate`, PEFT's mixed batch, and the paper's own layer."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.base import Base
from engine.model.inject import ProjectionSite
from engine.model.moe_lora import MoeLoraConfig


def generate_seconds(model: Any, prompts: Tensor, tokens: int, **arguments: Any) -> tuple[float, float]:
    """Seconds to the first token, and from it to the last of `tokens` more, by transformers' own loop, greedily."""
    settings = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 2}
    seconds = []
    for count in (1, 1 + tokens):
        started = time.perf_counter()
        model.generate(**settings, min_new_tokens=count, max_new_tokens=count, **arguments)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1] - seconds[0]


def peft_model(base: Base, *, adapters: Sequence[str], rank: int) -> Any:
    """The base with random LoRA adapters on all seven projections, which a mixed batch may use row by row."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank,
        lora_alpha=16,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=[site.projection for site in base.sites[:7]],
    )
    model = get_peft_model(base.model, settings, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, settings)
    for name, weights in model.named_parameters():
        if ".lora_" in name:
            weights.data = weights.data.to(base.dtype)
    return model.eval()


class PaperLayer(nn.Module):
    """A projection as section 3.2 of the paper writes it: every stack in turn, every expert computed, then weighed."""

    def __init__(self, site: ProjectionSite, *, stacks: int, config: MoeLoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = site.module
        self.config = config
        e, r = config.num_experts, config.rank
        shapes = {"a": (e, r, site.in_features), "b": (e, site.out_features, r), "gate": (e, site.in_features)}
        self.stacks = [
            {name: torch.randn(shape, dtype=dtype) * 0.01 for name, shape in shapes.items()} for _ in range(stacks)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y: Tensor = self.base(x)
        for stack in self.stacks:
            values, experts = (x @ stack["gate"].T).topk(self.config.top_k, dim=-1)
            gate = torch.zeros(*x.shape[:-1], self.config.num_experts, dtype=x.dtype)
            gate = gate.scatter(-1, experts, values.softmax(dim=-1))
            mid = torch.einsum("...i,eri->...er", x, stack["a"])
            out = torch.einsum("...er,eor->...eo", mid, stack["b"])
            y = y + self.config.alpha / math.sqrt(self.config.rank) * torch.einsum("...eo,...e->...o", out, gate)
        return y


def install_paper_layers(base: Base, *, stacks: int, config: MoeLoraConfig) -> None:
    """Replaces every projection by the paper's."""
    for site in base.sites:
        site.replace(PaperLayer(site, stacks=stacks, config=config, dtype=base.dtype))
