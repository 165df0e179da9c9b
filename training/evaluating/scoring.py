"""Scores continuations under mixes: every token of each, and whether each is the likeliest. Knows no harness.

Letters: N rows, L the longest, H hidden size, V vocabulary, A continuation tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.inject import injected
from engine.model.moe_lora import ServingDeltas
from training.discovery.candidate_losses import Row, RowLosses
from training.loss import pad


class Score(NamedTuple):
    """What a row's answer is worth."""

    log_likelihood: float  # summed over all its tokens, the first included, in nats
    is_greedy: bool  # each token is the likeliest after those before it


class RowScores(RowLosses):
    """Measures rows as the loss does, and looks which token is likeliest."""

    def scores(self, rows: Sequence[Row], wanted: Sequence[int]) -> Iterator[Mapping[int, Score]]:
        """The scores of the wanted rows by their index, batch by batch."""
        for batch in self.plan([rows[index] for index in wanted]):
            indices = [wanted[place] for place in batch]
            yield dict(zip(indices, self._score_batch([rows[index] for index in indices]), strict=True))

    def _score_batch(self, rows: Sequence[Row]) -> list[Score]:
        layout = pad([row.example for row in rows], self._base.device)
        deltas = ServingDeltas()
        deltas.current = self._step(rows, layout.token_ids.shape[1])
        with torch.no_grad(), injected(self._base.sites, deltas):
            # Without a mask: padding is on the right, where causal attention never looks.
            hidden = self._base.decoder(input_ids=layout.token_ids, use_cache=False).last_hidden_state  # (N, L, H)
            return [
                self._score(of_row[before], ids[1:][before[:-1]])
                for of_row, before, ids in zip(hidden, layout.before_answer, layout.token_ids, strict=True)
            ]

    def _score(self, states: Tensor, targets: Tensor) -> Score:
        """(A, H), (A,) of one row -> its score; the head runs on one row at a time, for V may be large."""
        logits = self._base.head(states).float()  # (A, V)
        chosen = logits.log_softmax(dim=-1).gather(1, targets.unsqueeze(1))  # (A, 1)
        return Score(float(chosen.double().sum()), bool((logits.argmax(dim=-1) == targets).all()))
