"""Attention of a packed step: the tokens of many sequences side by side, each reading its own pieces of the cache.

Registered with transformers under the name `brainstacks`; the step travels as a keyword argument through the model's
forward, so nothing global says which batch is running. Attention runs over each sequence's exact length: no padding.

Letters: T tokens of the step, N positions of the cache, Hq and Hk query and key heads, G = Hq / Hk, D head size, n new
tokens of a sequence, m tokens that it attends to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.block_table import Piece
from engine.errors import BaseUnsupported

ATTENTION_NAME = "brainstacks"


class CachedStep(Protocol):
    """What the attention of every layer gets: where the step's tokens go in the cache, and what each reads there."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """(Hq, T, D), (Hk, T, D) twice -> (T, Hq, D)."""
        ...


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One sequence's tokens in a step and its place in the cache."""

    first_token: int  # in the step
    num_tokens: int
    pieces: Sequence[Piece]  # of the cache, which hold the sequence
    num_past: int  # tokens already in the cache

    @property
    def num_keys(self) -> int:
        """How many positions the last new token attends to without a window."""
        return self.num_past + self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The cache of every layer and the rows of one step."""

    keys: Sequence[Tensor]  # per layer (Hk, N, D)
    values: Sequence[Tensor]
    write_positions: Tensor  # (T,)
    rows: Sequence[RowSpan]
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """Writes the new keys and values, then lets every row read its own."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(1, self.write_positions, key)
        values.index_copy_(1, self.write_positions, value)
        return torch.cat([_row(query, keys, values, self, row, window, scaling) for row in self.rows])

    def mask(self, row: RowSpan, window: int | None) -> Tensor:
        """(n, m) bool: which keys each new token of a row may read."""
        key = (row.num_past, row.num_tokens, window)
        if key not in self.masks:
            self.masks[key] = causal_mask(row.num_past, row.num_tokens, window, self.write_positions.device)
        return self.masks[key]


def causal_mask(num_past: int, num_tokens: int, window: int | None, device: torch.device) -> Tensor:
    """(n, past + n) bool: token i reads key j if j <= past + i and, with a window, j > past + i - window."""
    query = torch.arange(num_past, num_past + num_tokens, device=device).unsqueeze(1)
    key = torch.arange(num_past + num_tokens, device=device)
    allowed = key <= query
    return allowed if window is None else allowed & (key > query - window)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    attention_step: CachedStep | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, Hq, T, D), (1, Hk, T, D) twice -> (1, T, Hq, D). Without a step: one sequence that is not cached."""
    if softcap is not None:
        raise BaseUnsupported("a base with soft-capped attention logits is not supported")
    if attention_step is None:
        whole = RowSpan(0, query.shape[2], (), 0)
        step = AttentionStep((), (), torch.empty(0, device=query.device), (whole,))
        return _prefill(query[0], key[0], value[0], step, whole, sliding_window, scaling).unsqueeze(0), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = attention_step.attend(layer, query[0], key[0], value[0], scaling=scaling, window=sliding_window)
    return output.unsqueeze(0), None


def _row(
    query: Tensor, keys: Tensor, values: Tensor, step: AttentionStep, row: RowSpan, window: int | None, scaling: float
) -> Tensor:
    """(Hq, T, D), (Hk, N, D) twice -> (n, Hq, D) of one sequence."""
    is_decoding = row.num_tokens == 1
    first = max(0, row.num_keys - window) if is_decoding and window is not None else 0
    keys, values = (_positions(cache, row.pieces, first, row.num_keys) for cache in (keys, values))
    if is_decoding:
        return _decode(query[:, row.first_token], keys, values, scaling)
    new = query[:, row.first_token : row.first_token + row.num_tokens]
    return _prefill(new, keys, values, step, row, window, scaling)


def _positions(cache: Tensor, pieces: Sequence[Piece], first: int, last: int) -> Tensor:
    """(Hk, N, D) -> (Hk, last - first, D): those positions of a sequence; a view if they lie in one piece."""
    parts, at = [], 0  # how many positions of the sequence come before the piece
    for piece in pieces:
        low, high = max(first - at, 0), min(last - at, piece.length)
        if low < high:
            parts.append(cache[:, piece.start + low : piece.start + high])
        at += piece.length
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _decode(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """(Hq, D), (Hk, m, D) twice -> (1, Hq, D). The queries that share a key head stand in as its query positions."""
    heads, size = query.shape
    grouped = query.reshape(1, keys.shape[0], -1, size)  # (1, Hk, G, D)
    output = scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=scaling)
    return output.reshape(1, heads, size)


def _prefill(
    query: Tensor, keys: Tensor, values: Tensor, step: AttentionStep, row: RowSpan, window: int | None, scaling: float
) -> Tensor:
    """(Hq, n, D), (Hk, m, D) twice -> (n, Hq, D)."""
    plain = row.num_past == 0 and (window is None or row.num_tokens <= window)
    output = scaled_dot_product_attention(
        query.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=None if plain else step.mask(row, window),
        is_causal=plain,
        scale=scaling,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return output[0].transpose(0, 1)


def install_attention(model: Any) -> None:
    """Makes a model's decoder compute attention by packed steps. Raises BaseUnsupported for soft-capped attention."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        raise BaseUnsupported("a base with soft-capped attention logits is not supported")
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    model.get_decoder().config._attn_implementation = ATTENTION_NAME
