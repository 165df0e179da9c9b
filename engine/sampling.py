"""Picks the next token of each row of a batch. Knows logits and parameters, not sequences or text.

A row's token depends on its own logits, parameters and random numbers only, so it does not matter who shares the
batch. Letters: N rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from engine.types import SamplingParams, TokenLogprob


@dataclass(slots=True)
class RowSampler:
    """What one sequence's sampling has to remember between steps."""

    params: SamplingParams
    prompt_ids: frozenset[int]
    forbidden_before_min: frozenset[int]  # tokens that would end the sequence
    generator: Random = field(init=False)
    output_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.generator = Random(self.params.seed)  # noqa: S311 - no seed: from the system's entropy

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return self.output_counts.total()

    def adjust(self, logits: Tensor) -> None:
        """Applies bias, penalties and min_tokens to the row's logits (V,), in place."""
        params = self.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if params.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(self.prompt_ids | self.output_counts.keys()), device=logits.device)
            seen = logits[ids]
            logits[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        if self.output_counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self.output_counts), device=logits.device)
            counts = torch.tensor(list(self.output_counts.values()), device=logits.device)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if self.num_output < params.min_tokens and self.forbidden_before_min:
            logits[torch.tensor(sorted(self.forbidden_before_min), device=logits.device)] = -torch.inf


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """(N, V) float32, N rows -> N token ids, counted in their rows. Changes the logits in place."""
    for index, row in enumerate(rows):
        row.adjust(logits[index])
    tokens = logits.argmax(dim=-1).tolist()
    random_rows = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if random_rows:
        drawn = _draw(logits[random_rows], [rows[index] for index in random_rows])
        for index, token in zip(random_rows, drawn, strict=True):
            tokens[index] = token
    for row, token in zip(rows, tokens, strict=True):
        row.output_counts[token] += 1
    return tokens


def _draw(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """(N, V) -> N token ids by inverse transform: one uniform number a row, so a seed gives the same text anywhere."""
    temperature = torch.tensor([[row.params.temperature] for row in rows], device=logits.device)
    probabilities = (logits / temperature).softmax(dim=-1, dtype=torch.float64)
    uniform = torch.tensor([[row.generator.random()] for row in rows], device=logits.device, dtype=torch.float64)
    if all(row.params.top_p == 1.0 and row.params.top_k == 0 for row in rows):
        return _invert(probabilities, uniform).tolist()
    ordered, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = torch.where(_kept(ordered, rows), ordered, 0.0)
    return token_ids.gather(1, _invert(kept, uniform).unsqueeze(1)).squeeze(1).tolist()


def _kept(ordered: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """(N, V) probabilities, largest first -> bool: top_k, then the smallest set of them whose mass reaches top_p."""
    device, vocabulary = ordered.device, ordered.shape[-1]
    top_k = torch.tensor([[row.params.top_k or vocabulary] for row in rows], device=device)
    in_top_k = torch.arange(vocabulary, device=device) < top_k
    of_top_k = torch.where(in_top_k, ordered, 0.0)
    of_top_k = of_top_k / of_top_k.sum(dim=-1, keepdim=True)
    top_p = torch.tensor([[row.params.top_p] for row in rows], device=device)
    before = of_top_k.cumsum(dim=-1) - of_top_k
    return in_top_k & (before < top_p)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """(N, V) weights, (N, 1) in [0, 1) -> (N,): the first index whose running sum passes the uniform share."""
    running = weights.cumsum(dim=-1)
    target = uniform * running[:, -1:]
    index = torch.searchsorted(running, target, right=True).squeeze(1)
    last = weights.shape[-1] - 1 - weights.flip(-1).ne(0).int().argmax(dim=-1)  # rounding must not pick weight 0
    return torch.minimum(index, last)


@torch.inference_mode()
def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """(N, V) raw logits and N chosen tokens -> their natural-log probabilities and the likeliest alternatives."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    chosen = log_probabilities.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = log_probabilities.topk(num_top, dim=-1) if num_top else (logits[:, :0], logits[:, :0])
    return [
        TokenLogprob(token, logprob, tuple(zip(map(int, row_ids), row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    ]
