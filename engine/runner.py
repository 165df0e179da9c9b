"""Runs one step on the device: owns the cache's memory, the pack of stacks and the model. Knows no queues or text.

Letters: T tokens of the step, S stacks in the pack, H hidden size, V vocabulary.
"""

import importlib.util
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.attention import AttentionStep, RowSpan, install_attention
from engine.block_table import BLOCK_TOKENS, num_blocks_for
from engine.model.base import Base
from engine.model.fused_step import FusedRow, FusedStep, make_fused_step
from engine.model.inject import inject
from engine.model.moe_lora import ServingDeltas, ServingStack, StackPack
from engine.scheduler import ScheduledRow
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.decode_graphs import DecodeGraphs  # wants Triton, which is there where CUDA is


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed. Row i of the logits predicts the token after the i-th wanted position."""

    sampled: list[Sequence]
    sampled_logits: Tensor  # (sampled, V) float32
    # Of sequences with a `states_layer`: (tokens of this step, H) behind that layer, and behind the final norm.
    states: dict[Sequence, tuple[Tensor, Tensor]]


class Runner:
    """The device's one user. Not thread-safe: the engine's thread calls it."""

    def __init__(
        self,
        base: Base,
        *,
        num_kv_positions: int,
        fused_step: bool,
        max_rows: int,
        max_model_len: int,
        static_decode: bool | None = None,
    ) -> None:
        """`static_decode`: whether steps of one token a row run at static addresses; by default on CUDA with Triton."""
        self.base = base
        self._deltas = ServingDeltas()
        self._pack: StackPack | None = None
        self._packed: tuple[ServingStack, ...] = ()
        install_attention(base.model)
        inject(base.sites, self._deltas)
        config = base.text_config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if static_decode is None:
            static_decode = base.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        num_scratch = BLOCK_TOKENS if static_decode else 0  # of rows that only pad a batch
        shape = (base.num_layers, config.num_key_value_heads, num_kv_positions + num_scratch, head_size)
        # Written to: a CPU's system gives pages when they are used, so memory would grow for hours, and where there is
        # too little of it, that would show in the middle of the night.
        keys = torch.empty(shape, dtype=base.dtype, device=base.device).zero_()
        values = torch.empty(shape, dtype=base.dtype, device=base.device).zero_()
        self._keys, self._values = keys.unbind(0), values.unbind(0)
        self._fused = make_fused_step(base, keys, values) if fused_step else None
        max_blocks = num_blocks_for(max_model_len)
        self._graphs = (
            _decode_graphs(base, self._deltas, keys, values, max_rows=max_rows, max_blocks=max_blocks)
            if static_decode
            else None
        )

    @property
    def is_fused(self) -> bool:
        """Whether steps are fused."""
        return self._fused is not None

    def run(self, rows: Rows[ScheduledRow], running: Rows[Sequence]) -> StepOutput:
        """Passes the rows' tokens through the model, by the fused step if there is one."""
        if self._fused is not None:
            return self._run_fused(self._fused, rows)
        self._drop_stale_pack(running)
        if self._graphs is not None:
            decoding = [_fused_row(row) for row in rows]
            if all(map(self._graphs.takes, decoding)):
                return StepOutput([row.sequence for row in rows], self._graphs.run(decoding), {})
        return self._run_modules(rows, running)

    def _run_fused(self, fused: FusedStep, rows: Rows[ScheduledRow]) -> StepOutput:
        output = fused.run([_fused_row(row) for row in rows])
        read = [row.sequence for row in rows if row.sequence.states_layer is not None]
        sampled = [row.sequence for row in rows if row.is_sampled]
        return StepOutput(sampled, output.logits, dict(zip(read, output.states, strict=True)))

    def _run_modules(self, rows: Rows[ScheduledRow], packed: Rows[Sequence]) -> StepOutput:
        """By transformers' own modules. The pack covers the mixes of the `packed` sequences."""
        with torch.inference_mode():
            spans = _row_spans(rows)
            ids, positions, places = self._inputs(rows, spans)
            step = AttentionStep(self._keys, self._values, places, spans)
            self._bind_mix(rows, packed)
            wants_states = any(row.sequence.states_layer is not None for row in rows)
            output = self.base.decoder(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                attention_step=step,
                output_hidden_states=wants_states,
            )
            return self._output(rows, spans, output.last_hidden_state[0], output.hidden_states)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) in float32."""
        with torch.inference_mode():
            return self.base.head(hidden).float()

    def base_only(self) -> None:
        """Turns every stack off until the next step."""
        self._deltas.current = None

    def release_pack(self) -> None:
        """Drops the packed copy of the stacks that were in use."""
        self._pack, self._packed = None, ()
        self._deltas.current = None

    def _drop_stale_pack(self, running: Rows[Sequence]) -> None:
        """Also when only some of its stacks are in use no more: a pack must not keep an evicted domain's memory.

        And before the next is built: two packs never lie side by side.
        """
        if self._pack is not None and set(_stacks_in_use(running)) != set(self._packed):
            self.release_pack()

    def _inputs(self, rows: Rows[ScheduledRow], spans: Rows[RowSpan]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (1, T), positions in their sequence (1, T), places in the cache (T,)."""
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        for row, span in zip(rows, spans, strict=True):
            ids += row.sequence.token_ids[span.num_past : span.num_keys]
            positions += range(span.num_past, span.num_keys)
            places += map(row.sequence.table.place, range(span.num_past, span.num_keys))
        stacked = torch.tensor([ids, positions, places], device=self.base.device)
        return stacked[0:1], stacked[1:2], stacked[2]

    def _bind_mix(self, rows: Rows[ScheduledRow], packed: Rows[Sequence]) -> None:
        """Points the deltas at this step's stacks and weights; at none if no row of the step has a mix."""
        self._deltas.current = None
        if not any(row.sequence.request.mix for row in rows):
            return
        if self._pack is None:
            stacks = _stacks_in_use(packed)
            self._pack, self._packed = StackPack(stacks), stacks
        column = {stack: index for index, stack in enumerate(self._packed)}
        weights = torch.zeros(len(rows), len(self._packed))
        for index, row in enumerate(rows):
            for stack, weight in _stack_weights(row.sequence).items():
                weights[index, column[stack]] = weight
        counts = torch.tensor([row.num_tokens for row in rows])
        self._deltas.current = self._pack.step(weights.repeat_interleave(counts, dim=0))

    def _output(
        self, rows: Rows[ScheduledRow], spans: Rows[RowSpan], hidden: Tensor, layers: Rows[Tensor] | None
    ) -> StepOutput:
        """`hidden` (T, H) is behind the norm; `layers` (1, T, H) each, behind the embedding and each layer."""
        sampled = [(row.sequence, span) for row, span in zip(rows, spans, strict=True) if row.is_sampled]
        last = torch.tensor([span.first_token + span.num_tokens - 1 for _, span in sampled], dtype=torch.long)
        logits = self.logits(hidden[last.to(hidden.device)])
        states = {}
        for row, span in zip(rows, spans, strict=True):
            if layers is not None and row.sequence.states_layer is not None:
                of_row = slice(span.first_token, span.first_token + span.num_tokens)
                states[row.sequence] = layers[row.sequence.states_layer][0, of_row], hidden[of_row]
        return StepOutput([sequence for sequence, _ in sampled], logits, states)


def _decode_graphs(
    base: Base, deltas: ServingDeltas, keys: Tensor, values: Tensor, *, max_rows: int, max_blocks: int
) -> "DecodeGraphs":
    from engine.decode_graphs import DecodeGraphs

    return DecodeGraphs(base, deltas, keys, values, max_rows=max_rows, max_blocks=max_blocks)


def _stacks_in_use(sequences: Rows[Sequence]) -> tuple[ServingStack, ...]:
    """Of the mixes of all sequences, each once."""
    found = {stack: None for sequence in sequences for domain, _ in sequence.request.mix for stack in domain.stacks}
    return tuple(found)


def _row_spans(rows: Rows[ScheduledRow]) -> list[RowSpan]:
    spans: list[RowSpan] = []
    first_token = 0
    for row in rows:
        spans.append(RowSpan(first_token, row.num_tokens, row.sequence.table.pieces, row.sequence.num_computed))
        first_token += row.num_tokens
    return spans


def _fused_row(row: ScheduledRow) -> FusedRow:
    sequence = row.sequence
    past = sequence.num_computed
    ids = sequence.token_ids[past : past + row.num_tokens]
    return FusedRow(ids, sequence.table, past, _stack_weights(sequence), row.is_sampled, sequence.states_layer)


def _stack_weights(sequence: Sequence) -> dict[ServingStack, float]:
    """What each stack weighs in the sequence's mix: all rounds of a domain as much as the domain."""
    weights: dict[ServingStack, float] = {}
    for domain, weight in sequence.request.mix:
        for stack in domain.stacks:
            weights[stack] = weights.get(stack, 0.0) + weight
    return weights
