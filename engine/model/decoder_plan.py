"""Reads from a decoder's modules what the fused decode step needs. Knows architectures, not how they are computed.

A decoder that it does not know, or one with a setting that the fused step lacks, has no plan and is computed by
transformers' own code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.base import Base
from engine.model.inject import StackedLinear
from stack_store.format import INPUT_GROUPS

# Decoder layers of the one shape; Gemma's norms multiply by one plus their weight.
PLAIN_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
GEMMA_LAYERS = ("Gemma3DecoderLayer",)
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """What varies between the decoders that the fused step computes."""

    weights: dict[str, Tensor]  # by input group (L, O of the group, I)
    biases: dict[str, Tensor]  # by input group (L, O of the group) or (L, 0), float32
    norms: Tensor  # (L, 2 or 4, H) float32
    head_norms: Tensor  # (L, 2, D or 0) float32
    final_norm: Tensor  # (1, H) float32
    head_weight: Tensor  # (V, H)
    windows: tuple[int, ...]  # by layer; 0: none
    rope_names: tuple[str | None, ...]  # the rotary embeddings that the layers use
    rope_kinds: tuple[int, ...]  # by layer, index of its rotary embedding
    eps: float
    scaling: float
    is_gelu: bool
    num_key_heads: int


def plan_decoder(base: Base) -> DecoderPlan | None:
    """The plan of a base whose weights are dense, or None. The weights move into one tensor per input group.

    The projections go on using them there, so nothing is held twice.
    """
    layers: Sequence[Any] = base.decoder.layers  # type: ignore[assignment]
    is_gemma = type(layers[0]).__name__ in GEMMA_LAYERS
    if not (is_gemma or type(layers[0]).__name__ in PLAIN_LAYERS) or not _is_supported(base, layers[0]):
        return None
    config, attention = base.text_config, layers[0].self_attn
    names = ["input_layernorm", "post_attention_layernorm"]
    if is_gemma:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    kinds = [getattr(layer.self_attn, "layer_type", None) if is_gemma else None for layer in layers]
    rope_names = tuple(dict.fromkeys(kinds))
    groups = {name: [_linears(layer, members) for layer in layers] for name, members in INPUT_GROUPS.items()}
    model: Any = base.model
    return DecoderPlan(
        weights={name: _gathered(linears) for name, linears in groups.items()},
        biases={name: _biases(linears) for name, linears in groups.items()},
        norms=torch.stack([torch.stack([_norm(getattr(layer, n), is_gemma) for n in names]) for layer in layers]),
        head_norms=torch.stack([_head_norms(layer.self_attn, is_gemma) for layer in layers]),
        final_norm=_norm(base.decoder.norm, is_gemma).unsqueeze(0),
        head_weight=model.get_output_embeddings().weight.data,
        windows=tuple(_window(layer.self_attn, config) for layer in layers),
        rope_names=rope_names,
        rope_kinds=tuple(rope_names.index(kind) for kind in kinds),
        eps=float(config.rms_norm_eps),
        scaling=float(attention.scaling),
        is_gelu=ACTIVATIONS[_activation(config)],
        num_key_heads=int(config.num_key_value_heads),
    )


def _is_supported(base: Base, layer: Any) -> bool:
    config = base.text_config
    head: Any = base.model.get_output_embeddings()  # type: ignore[operator]
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    return (
        base.device.type == "cpu"
        and base.dtype in (torch.float32, torch.bfloat16)
        and _activation(config) in ACTIVATIONS
        and not any(getattr(config, name, None) for name in softcaps)
        and not getattr(config, "use_bidirectional_attention", False)
        and all(type(_unwrapped(site.module)) is nn.Linear for site in base.sites)
        and type(head) is nn.Linear
        and head.bias is None
        and head.weight.dtype == base.dtype
        and layer.self_attn.head_dim % 2 == 0
    )


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _window(attention: Any, config: Any) -> int:
    """How many tokens a layer attends to, 0: all. Mistral keeps it in its configuration only."""
    of_all_layers = getattr(config, "sliding_window", None) if type(attention).__name__ == "MistralAttention" else None
    return getattr(attention, "sliding_window", of_all_layers) or 0


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, StackedLinear) else module


def _linears(layer: Any, members: Sequence[str]) -> list[nn.Linear]:
    parents = [layer.self_attn if name[0] in "qkvo" else layer.mlp for name in members]
    linears = [_unwrapped(getattr(parent, name)) for parent, name in zip(parents, members, strict=True)]
    assert all(isinstance(linear, nn.Linear) for linear in linears)
    return linears  # type: ignore[return-value]


def _gathered(layers: Sequence[Sequence[nn.Linear]]) -> Tensor:
    """(L, O of the group, I); every projection's own weight becomes a view of it."""
    memory = torch.stack([torch.cat([linear.weight.data for linear in linears]) for linears in layers])
    for index, linears in enumerate(layers):
        parts = torch.split(memory[index], [linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
    return memory


def _biases(layers: Sequence[Sequence[nn.Linear]]) -> Tensor:
    """(L, O of the group), or (L, 0) where no projection of the group has one."""
    if all(linear.bias is None for linears in layers for linear in linears):
        return torch.zeros(len(layers), 0)
    return torch.stack([torch.cat([_bias(linear) for linear in linears]) for linears in layers])


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.data.float()


def _norm(module: Any, is_gemma: bool) -> Tensor:
    weight: Tensor = module.weight.data.float()
    return weight + 1.0 if is_gemma else weight.clone()


def _head_norms(attention: Any, is_gemma: bool) -> Tensor:
    modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if any(module is None for module in modules):
        return torch.zeros(2, 0)
    return torch.stack([_norm(module, is_gemma) for module in modules])
