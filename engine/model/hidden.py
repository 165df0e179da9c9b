"""Runs the base alone over one text and returns the hidden states that a router reads. Knows no router."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.base import Base


def hidden_states(base: Base, token_ids: Sequence[int], mid_layer: int) -> tuple[Tensor, Tensor]:
    """T token ids -> the output of layer `mid_layer` (T, H) and, after the final norm, of the last (T, H); float32.

    Layers count from 1; 0 is the embedding. The caller makes sure that no stack is active.
    """
    ids = torch.tensor([list(token_ids)], device=base.device)
    with torch.inference_mode():
        output = base.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    return output.hidden_states[mid_layer][0].float(), output.last_hidden_state[0].float()
