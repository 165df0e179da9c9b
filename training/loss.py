"""The one loss of training and validation: negative log-likelihood over answer tokens. Knows no optimiser.

Letters: N examples, L longest length, H hidden size, V vocabulary, A answer tokens, T tokens of the pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.base import Base
from engine.model.training_form import TrainingDeltas
from training.data.examples import Example


@dataclass(frozen=True, slots=True)
class Layout:
    """The examples of one pass as tensors."""

    token_ids: Tensor  # (N, L), or (1, T) if packed
    real: Tensor  # as token_ids, bool: not padding
    positions: Tensor | None  # (1, T) if packed: each example starts again at 0
    before_answer: Tensor  # as token_ids, bool: the positions that predict an answer token


def pad(examples: Sequence[Example], device: torch.device) -> Layout:
    """One example a row, padded on the right to the longest."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    real, before_answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        ids[row, :length] = torch.tensor(example.token_ids)
        real[row, :length] = True
        before_answer[row, example.prompt_length - 1 : length - 1] = True
    return Layout(ids.to(device), real.to(device), None, before_answer.to(device))


def pack(examples: Sequence[Example], device: torch.device) -> Layout:
    """All examples side by side in one row, without padding.

    transformers sees by the positions, which start again, where an example begins, and no token attends across.
    """
    rows = [pad([example], torch.device("cpu")) for example in examples]
    ids = torch.cat([row.token_ids for row in rows], dim=1)
    return Layout(
        token_ids=ids.to(device),
        real=torch.ones_like(ids, dtype=torch.bool, device=device),
        positions=torch.cat([torch.arange(row.token_ids.shape[1]) for row in rows]).unsqueeze(0).to(device),
        before_answer=torch.cat([row.before_answer for row in rows], dim=1).to(device),
    )


def answer_loss_sum(base: Base, deltas: TrainingDeltas, layout: Layout) -> tuple[Tensor, int]:
    """Summed loss (scalar, float32) over the answer tokens of a pass, and their number. Padding counts nothing."""
    hidden = hidden_states(base, deltas, layout)
    targets = layout.token_ids[:, 1:][layout.before_answer[:, :-1]]  # (A,)
    logits = base.head(hidden[layout.before_answer])  # (A, V): the head runs on answer positions only
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def hidden_states(base: Base, deltas: TrainingDeltas, layout: Layout) -> Tensor:
    """(N, L, H): the decoder's output, with the deltas that are injected."""
    deltas.real_tokens = None if layout.positions is not None else layout.real.flatten()
    padding = {"attention_mask": layout.real.long()} if layout.positions is None else {"position_ids": layout.positions}
    hidden: Tensor = base.decoder(input_ids=layout.token_ids, use_cache=False, **padding).last_hidden_state
    return hidden
