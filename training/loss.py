"""The one loss of training and validation: mean negative log-likelihood over answer tokens. Knows no optimiser.

Letters: N examples, L longest length, H hidden size, V vocabulary, A answer tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.base import Base
from engine.model.moe_lora import MoeLoraStack
from training.data import Example, length_batches


def answer_loss_sum(base: Base, stack: MoeLoraStack, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """Summed loss (scalar, float32) over the answer tokens of a batch, and their number. Padding counts nothing."""
    ids, mask = _pad(examples, base.device)
    stack.token_mask = mask.flatten().bool()
    hidden = base.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (N, L, H)
    before_answer = torch.zeros_like(ids, dtype=torch.bool)  # the position that predicts an answer token
    for row, example in enumerate(examples):
        before_answer[row, example.prompt_length - 1 : len(example.token_ids) - 1] = True
    targets = ids[:, 1:][before_answer[:, :-1]]  # (A,)
    logits = base.head(hidden[before_answer])  # (A, V): the head runs on answer positions only
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def mean_answer_loss(base: Base, stack: MoeLoraStack, examples: Sequence[Example], *, max_tokens: int) -> float:
    """Token-weighted mean loss over all answer tokens, without gradient. The same numbers in any batch size."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    # Not inference_mode: what it caches in the base could not take part in a later backward.
    with torch.no_grad():
        for batch in length_batches(ordered, max_tokens=max_tokens):
            loss, tokens = answer_loss_sum(base, stack, batch)
            total, count = total + loss.item(), count + tokens
    return total / count


def _pad(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        mask[row, : len(example.token_ids)] = 1
    return ids.to(device), mask.to(device)
