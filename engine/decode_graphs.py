"""Decode steps at static addresses: on CUDA captured once per size, then replayed without the host's work.

A step in which every row has one token differs from the next in a few numbers only: token ids, positions, places in the
cache, and where each row's stacks lie. These lie in one static block of memory that is filled before each step; the
model's own modules, with kernels of ours for attention and stacks, read them there. Rows are padded to a power of two,
and stacks of a row to one of a few numbers; each pair of these is one graph. A batch of the base alone has graphs of
its own, without any work for stacks.

Letters: B rows, S stacks of a row, V vocabulary, W static numbers of a row.
"""

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from engine.block_table import BLOCK_TOKENS, BlockTable, num_blocks_for
from engine.model.base import Base
from engine.model.decode_kernels import (
    MOST_CHOICES,
    MOST_EXPERTS,
    MOST_RANKS,
    ChosenExperts,
    RowStacks,
    add_chosen,
    attend,
    choose_experts,
    empty_choices,
)
from engine.model.fused_step import FusedRow
from engine.model.moe_lora import GroupKey, GroupPlace, ServingDeltas, ServingStack, group_places
from stack_store.format import INPUT_GROUPS

logger = logging.getLogger(__name__)

STACK_SIZES = (0, 4, 16)  # stacks of a row that a graph has room for
MOST_STACKS = STACK_SIZES[-1]
NUM_HEAD_NUMBERS = 4  # token id, position, place in the cache, keys to attend to


class PagedDecode:
    """Attention of rows with one token each, at static addresses; what the model's forward gets as its step."""

    def __init__(self, keys: Rows[Tensor], values: Rows[Tensor], places: Tensor, lengths: Tensor, tables: Tensor):
        self._keys = keys
        self._values = values
        self._places = places
        self._lengths = lengths
        self._tables = tables

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """(Hq, B, D), (Hk, B, D) twice -> (B, Hq, D); writes keys and values into the cache."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(1, self._places, key)
        values.index_copy_(1, self._places, value)
        return attend(query, keys, values, self._tables, self._lengths, scaling=scaling, window=window)


class PagedMix:
    """The deltas of rows whose stacks lie anywhere in device memory."""

    def __init__(self, stacks: RowStacks, places: dict[GroupKey, GroupPlace], scratch: ChosenExperts) -> None:
        self._stacks = stacks
        self._places = places
        self._scratch = scratch

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(1, B, O), (1, B, I) -> (1, B, O): y, which is changed."""
        place = self._places[layer, group]
        scratch = self._scratch.first((*self._stacks.addresses.shape, len(place.num_out)))
        if index == 0:  # the projections of a group are called one after the other, with the same input
            choose_experts(x[0].contiguous(), self._stacks, place, scratch)
        y = y.contiguous()
        add_chosen(y[0], self._stacks, place, index, scratch)
        return y


class DecodeGraphs:
    """Runs steps in which every row has one token: on CUDA as graphs, elsewhere the same work eagerly."""

    def __init__(
        self, base: Base, deltas: ServingDeltas, keys: Tensor, values: Tensor, *, max_rows: int, max_blocks: int
    ) -> None:
        """`keys` and `values` (L, Hk, N, D) are the cache; its last block belongs to rows that only pad the batch."""
        self._base = base
        self._deltas = deltas
        self._keys, self._values = keys.unbind(0), values.unbind(0)
        self._scratch_block = keys.shape[2] // BLOCK_TOKENS - 1
        self._row_sizes = _powers_of_two(max_rows)
        self._places = group_places(base.geometry)
        most_rows = self._row_sizes[-1]
        is_cuda = base.device.type == "cuda"
        width = NUM_HEAD_NUMBERS + max_blocks + 4 * MOST_STACKS
        self._host = torch.zeros(width, most_rows, dtype=torch.int64, pin_memory=is_cuda)
        self._host_weights = torch.zeros(MOST_STACKS, most_rows, pin_memory=is_cuda)
        self._numbers = self._host.to(base.device, copy=True)
        self._weights = self._host_weights.to(base.device, copy=True)
        self._tables_end = NUM_HEAD_NUMBERS + max_blocks
        most_members = max(map(len, INPUT_GROUPS.values()))
        self._scratch = empty_choices(MOST_STACKS, most_rows, most_members, device=base.device)
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        if is_cuda:
            self._capture_all()

    def takes(self, row: FusedRow) -> bool:
        """Whether the row can be computed here; else transformers' modules do it."""
        is_decoding = len(row.token_ids) == 1 and row.wants_logits and row.states_layer is None
        return is_decoding and len(row.mix) <= MOST_STACKS and all(map(_has_room, row.mix))

    def run(self, rows: Rows[FusedRow]) -> Tensor:
        """(B, V) float32: the logits behind each row's token, whose keys and values are written into the cache."""
        size = next(size for size in self._row_sizes if size >= len(rows))
        num_stacks = next(size for size in STACK_SIZES if size >= max(len(_in_use(row.mix)) for row in rows))
        self._fill(rows, size)
        graph = self._graphs.get((size, num_stacks))
        with torch.inference_mode():
            if graph is None:
                return self._forward(size, num_stacks)[: len(rows)].float()
            captured, logits = graph
            captured.replay()
            return logits[: len(rows)].float()  # a copy where the base computes in 16 bits; the next replay is later

    def _fill(self, rows: Rows[FusedRow], size: int) -> None:
        """The copy is over before the host's memory is written again: sampling waits for the step behind it."""
        numbers, weights = self._host, self._host_weights
        numbers.zero_()
        weights.zero_()
        numbers[2, len(rows) : size] = self._scratch_block * BLOCK_TOKENS
        numbers[3, len(rows) : size] = 1
        numbers[NUM_HEAD_NUMBERS, len(rows) : size] = self._scratch_block
        for index, row in enumerate(rows):
            head = [row.token_ids[0], row.past, row.table.place(row.past), row.past + 1]
            blocks = row.table.blocks[: num_blocks_for(row.past + 1)]
            numbers[: len(head) + len(blocks), index] = torch.tensor(head + blocks)
            for number, (stack, weight) in enumerate(_in_use(row.mix)):
                shape = (stack.num_experts, stack.rank, stack.top_k)
                for part, value in enumerate((stack.memory.data_ptr(), *shape)):
                    numbers[self._tables_end + part * MOST_STACKS + number, index] = value
                weights[number, index] = weight * stack.scale
        self._numbers.copy_(numbers, non_blocking=True)
        self._weights.copy_(weights, non_blocking=True)

    def _forward(self, size: int, num_stacks: int) -> Tensor:
        """(size, V), by the modules, from what lies at the static addresses."""
        ids, positions, places, lengths = (self._numbers[part, :size] for part in range(NUM_HEAD_NUMBERS))
        tables = self._numbers[NUM_HEAD_NUMBERS : self._tables_end, :size]
        step = PagedDecode(self._keys, self._values, places, lengths, tables)
        self._deltas.current = self._mix(size, num_stacks) if num_stacks else None
        output = self._base.decoder(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, attention_step=step
        )
        return self._base.head(output.last_hidden_state[0])

    def _mix(self, size: int, num_stacks: int) -> PagedMix:
        stacks = self._numbers[self._tables_end :].view(4, MOST_STACKS, -1)[:, :num_stacks, :size]
        row_stacks = RowStacks(stacks[0], stacks[1:], self._weights[:num_stacks, :size])
        return PagedMix(row_stacks, self._places, self._scratch)

    def _capture_all(self) -> None:
        """Largest first, so that the smaller graphs find room in the memory of the larger."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._base.device)  # type: ignore[no-untyped-call]
        padding = FusedRow([0], BlockTable.of([self._scratch_block]), 0, {}, True)
        for size in reversed(self._row_sizes):
            for num_stacks in reversed(STACK_SIZES):
                self._fill([padding], size)
                with torch.inference_mode(), torch.cuda.stream(stream):
                    self._forward(size, num_stacks)  # compiles kernels, which a capture may not
                    stream.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    # Loader threads may allocate meanwhile, hence not "global".
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        logits = self._forward(size, num_stacks)
                self._graphs[size, num_stacks] = graph, logits
        torch.cuda.synchronize(self._base.device)
        logger.info("decode graphs captured count=%d seconds=%.1f", len(self._graphs), time.monotonic() - started)


def _in_use(mix: Mapping[ServingStack, float]) -> list[tuple[ServingStack, float]]:
    """A row's stacks in an order that depends on neither the other rows nor on where they lie."""
    return sorted(
        ((stack, weight) for stack, weight in mix.items() if weight != 0.0),
        key=lambda item: (item[0].domain, item[0].round),
    )


def _has_room(stack: ServingStack) -> bool:
    return stack.num_experts <= MOST_EXPERTS and stack.top_k <= MOST_CHOICES and stack.rank <= MOST_RANKS


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4 and so on, the last at least `most`."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return sizes
