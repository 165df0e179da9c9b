"""Picks the next token of each row of a batch. Knows logits and parameters, not sequences or text.

A row's token depends on its own logits, parameters and random numbers only, so it does not matter who shares the
batch. Letters: N rows, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import GrammarTooComplex
from engine.grammar import GrammarState
from engine.types import SamplingParams, TokenLogprob

MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy: the quotient would overflow


@dataclass(slots=True)
class RowSampler:
    """What one sequence's sampling has to remember between steps."""

    params: SamplingParams
    prompt_ids: frozenset[int]
    forbidden_before_min: frozenset[int]  # tokens that would end the sequence
    generator: Random = field(init=False)
    grammar: GrammarState | None = field(init=False)
    output_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        seed = self.params.seed  # Random takes the absolute value, which would make -1 and 1 twins
        self.generator = Random(None if seed is None else seed % 2**64)  # noqa: S311 - None: the system's entropy
        self.grammar = None if self.params.grammar is None else self.params.grammar.start()

    @property
    def is_restricted(self) -> bool:
        """Whether top_k or top_p leave tokens out."""
        return self.params.top_p < 1.0 or self.params.top_k > 0

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return self.output_counts.total()

    @property
    def is_complete(self) -> bool:
        """Whether the row's grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def grammar_error(self) -> GrammarTooComplex | None:
        """Why the row's tokens are not inside its grammar, if they are not."""
        return None if self.grammar is None else self.grammar.error

    def repetition(self) -> Mapping[int, float]:
        """By token that was seen, what its logit is divided or multiplied by."""
        factor = self.params.repetition_penalty
        return {} if factor == 1.0 else dict.fromkeys(self.prompt_ids | self.output_counts.keys(), factor)

    def penalties(self) -> Mapping[int, float]:
        """By token that was produced, what is subtracted from its logit."""
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if not (presence or frequency):
            return {}
        return {token: presence + frequency * count for token, count in self.output_counts.items()}

    def forbidden(self) -> Mapping[int, float]:
        """By token that must not come yet, infinity."""
        may_end = self.grammar is not None or self.num_output >= self.params.min_tokens
        return {} if may_end else dict.fromkeys(self.forbidden_before_min, math.inf)

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """(V,) what the grammar allows next; its end only once there are enough tokens, if anything else is left."""
        assert self.grammar is not None
        allowed = self.grammar.allowed(vocabulary)
        if self.num_output < self.params.min_tokens:
            longer = allowed.copy()
            longer[list(self.forbidden_before_min)] = False
            return longer if longer.any() else allowed
        return allowed

    def take(self, token: int) -> None:
        """The token that was chosen."""
        self.output_counts[token] += 1
        if self.grammar is not None:
            self.grammar.take(token)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """(N, V) float32, N rows -> N token ids, counted in their rows. Changes the logits in place."""
    adjust(logits, rows)
    tokens = logits.argmax(dim=-1).tolist()
    drawing = [index for index, row in enumerate(rows) if row.params.temperature >= MIN_TEMPERATURE]
    # Apart, because each way of drawing maps the same random number to another token.
    for draw, indices in (
        (_draw_from_all, [index for index in drawing if not rows[index].is_restricted]),
        (_draw_from_likeliest, [index for index in drawing if rows[index].is_restricted]),
    ):
        if indices:
            drawn = draw(logits[indices], [rows[index] for index in indices])
            for index, token in zip(indices, drawn, strict=True):
                tokens[index] = token
    for row, token in zip(rows, tokens, strict=True):
        row.take(token)
    return tokens


def adjust(logits: Tensor, rows: Sequence[RowSampler]) -> None:
    """Applies bias, penalties, min_tokens, grammars to (N, V), in place and in this order, each to all rows at once."""
    if (named := _named(logits, [row.params.logit_bias for row in rows])) is not None:
        places, bias = named
        logits[places] += bias
    if (named := _named(logits, [row.repetition() for row in rows])) is not None:
        places, factor = named
        seen = logits[places]
        logits[places] = torch.where(seen > 0, seen / factor, seen * factor)
    for of_rows in ([row.penalties() for row in rows], [row.forbidden() for row in rows]):
        if (named := _named(logits, of_rows)) is not None:
            places, amount = named
            logits[places] -= amount
    if constrained := [index for index, row in enumerate(rows) if row.grammar is not None]:
        allowed = np.stack([rows[index].allowed(logits.shape[-1]) for index in constrained])
        ruled_out = torch.from_numpy(~allowed).to(logits.device)
        for index, of_row in zip(constrained, ruled_out, strict=True):  # in place: half of what gathering rows takes
            logits[index].masked_fill_(of_row, -torch.inf)


def _named(logits: Tensor, of_rows: Sequence[Mapping[int, float]]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Rows and tokens that some rows name, and their values: all (M,). None if no row names any."""
    if not any(of_rows):
        return None
    rows = [index for index, values in enumerate(of_rows) for _ in values]
    places = torch.tensor([rows, [token for values in of_rows for token in values]], device=logits.device)
    return (places[0], places[1]), torch.tensor(
        [v for values in of_rows for v in values.values()], device=logits.device
    )


def _draw_from_all(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """(N, V) -> N token ids by inverse transform: one uniform number a row, so a seed gives the same text anywhere."""
    return _invert(_probabilities(logits, rows), _uniform(rows, logits.device)).tolist()


def _draw_from_likeliest(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """(N, V) -> N token ids, each from what top_k and top_p leave of its row."""
    ordered, token_ids = _probabilities(logits, rows).sort(dim=-1, descending=True, stable=True)
    kept = torch.where(_kept(ordered, rows), ordered, 0.0)
    place = _invert(kept, _uniform(rows, logits.device))
    return token_ids.gather(1, place.unsqueeze(1)).squeeze(1).tolist()


def _probabilities(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    temperature = torch.tensor([[row.params.temperature] for row in rows], device=logits.device, dtype=torch.float64)
    return (logits.double() / temperature).softmax(dim=-1)


def _uniform(rows: Sequence[RowSampler], device: torch.device) -> Tensor:
    return torch.tensor([[row.generator.random()] for row in rows], device=device, dtype=torch.float64)


def _kept(ordered: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """(N, V) probabilities, largest first -> bool: top_k, then the smallest set of them whose mass reaches top_p."""
    device, vocabulary = ordered.device, ordered.shape[-1]
    top_k = torch.tensor([[min(row.params.top_k or vocabulary, vocabulary)] for row in rows], device=device)
    in_top_k = torch.arange(vocabulary, device=device) < top_k
    of_top_k = torch.where(in_top_k, ordered, 0.0)
    of_top_k = of_top_k / of_top_k.sum(dim=-1, keepdim=True)
    top_p = torch.tensor([[row.params.top_p] for row in rows], device=device, dtype=torch.float64)
    before = of_top_k.cumsum(dim=-1) - of_top_k
    first = torch.arange(vocabulary, device=device) == 0  # kept even if top_p is too small for it
    return in_top_k & ((before < top_p) | first)


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
