"""Turns a text into the features that the router reads, one function for training and serving.

Knows how tokens are counted and how hidden states are mixed; does not know which model makes them.
Legend: B texts in a batch, T tokens, H hidden size of the base.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from router.errors import EmptyText

TEXT_FORMS = ("raw",)

HiddenStates = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""Token ids -> (mid (T, H), last (T, H)) of the base alone; last is after the final norm."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the router needs."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What a router was trained to read; it travels in the router file and serving uses nothing else.

    `mid_layer` counts the embeddings as 0. `max_tokens` is a limit, not an error: a longer text is routed by its start.
    `text_form` "raw" means the user's words as they are, without a chat template.
    """

    mid_layer: int
    mid_weight: float = 0.45
    last_weight: float = 0.55
    max_tokens: int = 256
    text_form: str = "raw"

    def __post_init__(self) -> None:
        if self.mid_layer < 0:
            raise ValueError(f"mid_layer must be at least 0, not {self.mid_layer}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.mid_weight) and math.isfinite(self.last_weight)):
            raise ValueError(f"mid_weight and last_weight must be finite, not {self.mid_weight} and {self.last_weight}")
        if self.text_form not in TEXT_FORMS:
            raise ValueError(f"text_form must be one of {TEXT_FORMS}, not {self.text_form!r}")


def router_token_ids(tokenizer: Tokenizer, text: str, settings: FeatureSettings) -> list[int]:
    """The ids of the text's first `max_tokens` tokens, without special tokens. EmptyText if it has none."""
    # Cut here, not by the tokenizer: its truncation setting is shared state, which breaks when two threads change it.
    token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)[: settings.max_tokens]
    if not token_ids:
        raise EmptyText(f"a text of {len(text)} characters has no tokens, so it cannot be routed")
    return token_ids


@torch.no_grad()
def token_features(
    text: str, *, tokenizer: Tokenizer, hidden_states: HiddenStates, settings: FeatureSettings
) -> Tensor:
    """text -> (T, H) float32, on the device of the hidden states: weighted mid plus last (paper, section 3.6)."""
    token_ids = router_token_ids(tokenizer, text, settings)
    mid, last = hidden_states(token_ids)  # (T, H) each
    if mid.shape != last.shape or mid.ndim != 2 or len(mid) != len(token_ids):
        raise ValueError(
            f"hidden states of T={len(token_ids)} tokens must be (T, H), not {tuple(mid.shape)} and {tuple(last.shape)}"
        )
    return settings.mid_weight * mid.float() + settings.last_weight * last.float()


def pad_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """B tensors (T_b, H) of any float type -> features (B, T, H) float32, mask (B, T) true on tokens. T = max T_b."""
    lengths = torch.tensor([len(rows) for rows in features])  # (B,)
    if not lengths.all():
        raise EmptyText(f"text {int(lengths.argmin())} of the batch has no tokens, so it cannot be routed")
    padded = pad_sequence([rows.float() for rows in features], batch_first=True)  # (B, T, H)
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(-1)  # (B, T)
    return padded, mask.to(padded.device)
