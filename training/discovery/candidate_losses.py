"""Measures the answer loss of many rows, each an example under a mix of its own. Knows no search and no files.

Letters: N rows of a batch, L its longest row, T = N * L tokens with padding, S stacks in a pack, A answer tokens,
H hidden size, V vocabulary.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.base import Base
from engine.model.inject import injected
from engine.model.moe_lora import PackStep, ServingDeltas, ServingStack, StackPack
from training.context import pack_of
from training.data.examples import Example
from training.discovery.batch_plan import RowShape, plan_batches
from training.discovery.row_loss import RowLoss as RowLoss
from training.discovery.side_by_side import ThreadedDeltas, run_side_by_side
from training.errors import TrainingDiverged
from training.loss import Layout, pad

HEAD_TOKENS = 128  # answer tokens whose logits are held at once: V numbers each
MAX_PACKS = 4  # each is a copy of its stacks


@dataclass(frozen=True, slots=True)
class Row:
    """An example and the weight of each domain in it; a domain that is not named, or at 0, is not active."""

    example: Example
    weights: Mapping[str, float]

    @property
    def shape(self) -> RowShape:
        """What the row costs."""
        active = frozenset(name for name, weight in self.weights.items() if weight)
        return RowShape(len(self.example.token_ids), active)


class RowLosses:
    """Measures rows under mixes of these frozen domains, many rows a pass, by the serving form of the stacks."""

    def __init__(
        self,
        base: Base,
        domains: Mapping[str, Sequence[ServingStack]],
        *,
        max_tokens: int,
        max_packs: int = MAX_PACKS,
    ) -> None:
        """A pass holds at most `max_tokens` with padding, or one row; `max_packs` packs are kept for later batches."""
        self._base, self._domains = base, domains
        self._max_tokens, self._max_packs = max_tokens, max_packs
        self._packs: OrderedDict[tuple[str, ...], StackPack] = OrderedDict()
        self._packing = Lock()

    def measure(self, rows: Sequence[Row]) -> list[RowLoss]:
        """Each row's loss, in the order of the rows. Raises TrainingDiverged if one is not finite, naming its mix."""
        plan, losses = self.plan(rows), dict[int, RowLoss]()
        self.measure_batches(
            [[rows[index] for index in batch] for batch in plan],
            lambda place, measured: losses.update(zip(plan[place], measured, strict=True)),
        )
        return [losses[index] for index in range(len(rows))]

    def plan(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows' indices in the batches in which they are best measured."""
        return plan_batches([row.shape for row in rows], max_tokens=self._max_tokens)

    def measure_batches(self, batches: Sequence[Sequence[Row]], on_batch: Callable[[int, list[RowLoss]], None]) -> None:
        """Calls `on_batch` with the index and the losses of each batch as they are measured, in any order.

        On a CPU batches are measured side by side. Raises TrainingDiverged as `measure` does.
        """
        if self._base.device.type != "cpu":
            for index, batch in enumerate(batches):
                on_batch(index, self.measure_batch(batch))
            return
        deltas = ThreadedDeltas()
        with injected(self._base.sites, deltas):
            run_side_by_side(batches, lambda batch: self._pass(batch, deltas.mine), on_batch)

    def measure_batch(self, rows: Sequence[Row]) -> list[RowLoss]:
        """The losses of these rows, in one pass whatever its size. Raises TrainingDiverged as `measure` does."""
        deltas = ServingDeltas()
        with injected(self._base.sites, deltas):
            return self._pass(rows, deltas)

    def _pass(self, rows: Sequence[Row], deltas: ServingDeltas) -> list[RowLoss]:
        """The losses of these rows, under the deltas that are injected."""
        layout = pad([row.example for row in rows], self._base.device)
        deltas.current = self._step(rows, layout.token_ids.shape[1])
        # Not inference_mode: what it caches in the base could not take part in a later backward.
        with torch.no_grad():
            # Without a mask: padding is on the right, where causal attention never looks.
            hidden = self._base.decoder(input_ids=layout.token_ids, use_cache=False).last_hidden_state  # (N, L, H)
            sums = self._answer_loss_sums(hidden, layout)
        return [_row_loss(row, loss_sum) for row, loss_sum in zip(rows, sums.tolist(), strict=True)]

    def _step(self, rows: Sequence[Row], longest: int) -> PackStep | None:
        """The pack of the domains in use, bound to each token's weights (T, S); None if no row uses any."""
        in_use = frozenset[str]().union(*(row.shape.domains for row in rows))
        names = tuple(name for name in self._domains if name in in_use)
        if unknown := sorted(in_use - set(names)):
            raise ValueError(f"a row uses the domains {unknown}; there are {list(self._domains)}")
        if not names:
            return None
        of_rows = [[row.weights.get(name, 0.0) for name in names for _ in self._domains[name]] for row in rows]
        return self._pack(names).step(torch.tensor(of_rows).repeat_interleave(longest, dim=0))

    def _pack(self, names: tuple[str, ...]) -> StackPack:
        """Packs are reused: building one copies its stacks."""
        with self._packing:
            pack = self._packs.pop(names, None) or pack_of(names, self._domains)
            assert pack is not None
            self._packs[names] = pack
            while len(self._packs) > self._max_packs:
                self._packs.popitem(last=False)
            return pack

    def _answer_loss_sums(self, hidden: Tensor, layout: Layout) -> Tensor:
        """(N, L, H) -> (N,) float64 on the CPU: each row's loss over its answer; the head runs there only."""
        targets = layout.token_ids[:, 1:][layout.before_answer[:, :-1]]  # (A,)
        states = hidden[layout.before_answer]  # (A, H)
        losses = torch.cat(
            [
                F.cross_entropy(self._base.head(part).float(), wanted, reduction="none")
                for part, wanted in zip(
                    torch.split(states, HEAD_TOKENS), torch.split(targets, HEAD_TOKENS), strict=True
                )
            ]
        )
        counts = layout.before_answer.sum(dim=1).tolist()
        return _sums_of_parts(losses.double().cpu(), counts)


def _sums_of_parts(values: Tensor, counts: Iterable[int]) -> Tensor:
    """(A,) -> (N,): the sums of N consecutive parts of these lengths."""
    return torch.stack([part.sum() for part in torch.split(values, list(counts))])


def _row_loss(row: Row, loss_sum: float) -> RowLoss:
    if not math.isfinite(loss_sum):
        raise TrainingDiverged(f"the loss of a row under the mix {dict(row.weights)} is {loss_sum}")
    return RowLoss(loss_sum, row.example.answer_length)
