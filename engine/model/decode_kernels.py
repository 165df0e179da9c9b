"""What one decode step on a GPU needs beside the base's own products: paged attention, and stacks read where they lie.

Written in Triton. All that changes from step to step lies in device memory, addresses of stacks included, so a captured
graph stays valid whatever is loaded, evicted or mixed. A row pays for its own stacks and for the chosen experts only.

Letters: B rows, one token each, S stacks of a row, P projections of an input group, E experts, R rank, K active
experts, I in, O out, Hq and Hk query and key heads, D head size, N positions of the cache.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.block_table import BLOCK_TOKENS
from engine.model.moe_lora import GroupPlace

# What a stack may have at most to be computed here; other shapes go through the modules.
MOST_EXPERTS = 16
MOST_CHOICES = 4
MOST_RANKS = 64

# What a program holds at once: enough loads that wait for memory side by side, and few enough registers.
RANK_TILE = 16
MOST_INPUTS_AT_ONCE = 2048
COLUMNS = 64
STACKS_AT_ONCE = 2
POSITIONS = 64
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class RowStacks:
    """Which stacks each row uses; views of static memory. An address of 0 is no stack."""

    addresses: Tensor  # (S, B) int64, of a stack's flat memory
    shapes: Tensor  # (3, S, B) int64: E, R, K
    weights: Tensor  # (S, B) float32: the stack's weight in the row's mix, times its scale


@dataclass(frozen=True, slots=True)
class ChosenExperts:
    """What a row's stacks make of one input: for each projection and chosen expert, A x times gate and weight."""

    mids: Tensor  # (S, B, P, K, R) float32
    experts: Tensor  # (S, B, P, K) int64

    def first(self, shape: tuple[int, int, int]) -> "ChosenExperts":
        """The beginning of this memory, as that of S stacks of B rows for P projections."""
        size = math.prod(shape)
        mids, experts = (part.flatten(0, 2)[:size] for part in (self.mids, self.experts))
        return ChosenExperts(mids.view(*shape, *mids.shape[1:]), experts.view(*shape, *experts.shape[1:]))


def empty_choices(num_stacks: int, num_rows: int, num_projections: int, *, device: torch.device) -> ChosenExperts:
    """Memory for so many."""
    shape = (num_stacks, num_rows, num_projections, MOST_CHOICES)
    experts = torch.zeros(shape, dtype=torch.int64, device=device)
    return ChosenExperts(torch.zeros(*shape, MOST_RANKS, device=device), experts)


def choose_experts(x: Tensor, stacks: RowStacks, place: GroupPlace, scratch: ChosenExperts) -> None:
    """(B, I) -> the scratch: gates, softmax over the K largest, A products, for all projections of a group."""
    num_stacks, rows = stacks.addresses.shape
    _, _, num_projections, most_choices, most_ranks = scratch.mids.shape
    _choose_kernel[num_stacks, rows, num_projections * most_choices](
        x,
        *(stacks.addresses, stacks.addresses.stride(0), stacks.shapes, stacks.shapes.stride(0), stacks.weights),
        *(scratch.mids, scratch.experts),
        *(place.rank_rows, place.expert_rows, place.num_in, rows, num_projections),
        dtype=TRITON_DTYPES[x.dtype],
        most_experts=MOST_EXPERTS,
        most_choices=most_choices,
        most_ranks=most_ranks,
        rank_tile=RANK_TILE,
        width=min(MOST_INPUTS_AT_ONCE, triton.next_power_of_2(place.num_in)),
        num_warps=8,
    )


def add_chosen(y: Tensor, stacks: RowStacks, place: GroupPlace, projection: int, scratch: ChosenExperts) -> None:
    """(B, O) in place: plus what the chosen experts of each row's stacks add to one projection."""
    num_stacks, rows = stacks.addresses.shape
    _, _, num_projections, most_choices, most_ranks = scratch.mids.shape
    num_out = place.num_out[projection]
    _add_kernel[rows, triton.cdiv(num_out, COLUMNS)](
        y,
        *(stacks.addresses, stacks.addresses.stride(0), stacks.shapes, stacks.shapes.stride(0)),
        *(scratch.mids, scratch.experts),
        # B of a projection lies behind the group's A and gates, and the B of the projections before it.
        place.rank_rows + num_projections * place.num_in + sum(place.num_out[:projection]),
        place.expert_rows + num_projections * place.num_in,
        *(num_out, num_stacks, rows, num_projections, projection),
        dtype=TRITON_DTYPES[y.dtype],
        most_choices=most_choices,
        most_ranks=most_ranks,
        stacks_at_once=STACKS_AT_ONCE,
        rank_tile=RANK_TILE,
        width=COLUMNS,
    )


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, *, scaling: float, window: int | None
) -> Tensor:
    """(Hq, B, D), cache (Hk, N, D) twice, blocks of each row (blocks, B), keys of each row (B,) -> (B, Hq, D)."""
    heads, rows, size = query.shape
    output = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    group = heads // keys.shape[0]
    _attend_kernel[rows, keys.shape[0]](
        *(query, query.stride(0), query.stride(1), keys, values, keys.stride(0)),
        *(tables, tables.stride(0), lengths, output, heads),
        scaling,
        window=0 if window is None else window,
        group=group,
        size=size,
        most_group=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
        most_size=max(16, triton.next_power_of_2(size)),
        block=BLOCK_TOKENS,
        tile=POSITIONS,
    )
    return output


@triton.jit
def _choose_kernel(
    x, addresses, address_stride, shapes, shape_stride, weights, mids, experts,
    rank_rows, expert_rows, num_in, num_rows, num_projections,
    dtype: tl.constexpr, most_experts: tl.constexpr, most_choices: tl.constexpr, most_ranks: tl.constexpr,
    rank_tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """One program for each stack, row, projection and choice: all gates again, then A of the one expert.

    A row's few numbers are far too little work for a GPU, so what counts is how many loads wait for each other: reading
    the gates once per choice costs nothing beside a second kernel or a longer loop.
    """
    stack, row = tl.program_id(0), tl.program_id(1)
    projection, choice = tl.program_id(2) // most_choices, tl.program_id(2) % most_choices
    entry = stack * address_stride + row
    address = tl.load(addresses + entry)
    num_experts = tl.load(shapes + entry)
    rank = tl.load(shapes + shape_stride + entry)
    top_k = tl.load(shapes + 2 * shape_stride + entry)
    weight = tl.load(weights + entry)
    if (address == 0) | (choice >= top_k):
        return
    ranks_of_all = num_experts * rank
    # The compiler cannot know how an address out of memory is aligned; torch's allocator aligns a stack's memory.
    a = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + ranks_of_all * rank_rows + num_experts * expert_rows
    a += projection * (ranks_of_all + num_experts) * num_in
    gates = a + ranks_of_all * num_in
    x += row * num_in
    columns, numbers = tl.arange(0, width), tl.arange(0, most_experts)

    logits = tl.zeros([most_experts], tl.float32)
    for first in range(0, num_in, width):
        inside = first + columns < num_in
        part = tl.load(x + first + columns, mask=inside, other=0.0).to(tl.float32)
        at = gates + numbers[:, None] * num_in + first + columns[None, :]
        gate = tl.load(at, mask=(numbers < num_experts)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        logits += tl.sum(gate * part[None, :], axis=1)
    left = tl.where(numbers < num_experts, logits, -float("inf"))

    largest = tl.max(left, axis=0)
    total, share, expert = 0.0, 0.0, num_experts * 0
    for number in range(top_k):
        # An input that is not a number has no largest logit; nothing may be read outside the stack for it.
        next_expert = tl.minimum(tl.argmax(left, axis=0), num_experts - 1)
        next_share = tl.exp(tl.max(left, axis=0) - largest)
        total += next_share
        share = tl.where(number == choice, next_share, share)
        expert = tl.where(number == choice, next_expert, expert)
        left = tl.where(numbers == next_expert, -float("inf"), left)

    place = ((stack * num_rows + row) * num_projections + projection) * most_choices + choice
    tl.store(experts + place, expert)
    for first_rank in range(0, rank, rank_tile):
        ranks = first_rank + tl.arange(0, rank_tile)
        sums = tl.zeros([rank_tile], tl.float32)
        for first in range(0, num_in, width):
            inside = first + columns < num_in
            part = tl.load(x + first + columns, mask=inside, other=0.0).to(tl.float32)
            at = a + (expert * rank + ranks)[:, None] * num_in + first + columns[None, :]
            values = tl.load(at, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            sums += tl.sum(values * part[None, :], axis=1)
        tl.store(mids + place * most_ranks + ranks, sums * (share / total * weight), mask=ranks < rank)


@triton.jit
def _add_kernel(
    y, addresses, address_stride, shapes, shape_stride, mids, experts,
    rank_rows, expert_rows, num_out, num_stacks, num_rows, num_projections, projection,
    dtype: tl.constexpr, most_choices: tl.constexpr, most_ranks: tl.constexpr,
    stacks_at_once: tl.constexpr, rank_tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """One program for each row and panel of columns; the rows of B of several stacks' chosen experts are one tile."""
    row, panel = tl.program_id(0), tl.program_id(1)
    columns = panel * width + tl.arange(0, width)
    lines = tl.arange(0, stacks_at_once * most_choices * rank_tile)
    choices, ranks_of_tile = (lines // rank_tile) % most_choices, lines % rank_tile
    inside = columns < num_out
    total = tl.zeros([width], tl.float32)
    for first_stack in range(0, num_stacks, stacks_at_once):
        stacks = first_stack + lines // (rank_tile * most_choices)
        is_stack = stacks < num_stacks
        entries = stacks * address_stride + row
        address = tl.load(addresses + entries, mask=is_stack, other=0)
        num_experts = tl.load(shapes + entries, mask=is_stack, other=0)
        rank = tl.load(shapes + shape_stride + entries, mask=is_stack, other=0)
        top_k = tl.load(shapes + 2 * shape_stride + entries, mask=is_stack, other=0)
        rank = tl.where((address != 0) & (choices < top_k), rank, 0)
        places = ((stacks * num_rows + row) * num_projections + projection) * most_choices + choices
        expert = tl.load(experts + places, mask=is_stack, other=0)
        b = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
        b += num_experts * rank * rank_rows + num_experts * expert_rows
        for first_rank in range(0, tl.max(rank, axis=0), rank_tile):
            ranks = first_rank + ranks_of_tile
            is_read = ranks < rank
            mid = tl.load(mids + places * most_ranks + ranks, mask=is_read, other=0.0)
            at = b[:, None] + (expert * rank + ranks)[:, None] * num_out + columns[None, :]
            values = tl.load(at, mask=is_read[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(mid[:, None] * values, axis=0)
    before = tl.load(y + row * num_out + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * num_out + columns, (before + total).to(dtype), mask=inside)


@triton.jit
def _attend_kernel(
    query, query_head_stride, query_row_stride, keys, values, head_stride, tables, table_stride, lengths, output,
    num_heads, scaling,
    window: tl.constexpr, group: tl.constexpr, size: tl.constexpr,
    most_group: tl.constexpr, most_size: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, key_head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    first = length * 0
    if window > 0:
        first = tl.maximum(0, length - window)
    members, places, tokens = tl.arange(0, most_group), tl.arange(0, most_size), tl.arange(0, tile)
    heads = key_head * group + members
    is_query = (members < group)[:, None] & (places < size)[None, :]
    at = query + heads[:, None] * query_head_stride + row * query_row_stride + places[None, :]
    wanted = tl.load(at, mask=is_query, other=0.0).to(tl.float32)
    best = tl.full([most_group], -float("inf"), tl.float32)
    total = tl.zeros([most_group], tl.float32)
    summed = tl.zeros([most_group, most_size], tl.float32)
    for number in range(first // tile, (length + tile - 1) // tile):
        positions = number * tile + tokens
        is_read = (positions >= first) & (positions < length)
        blocks = tl.load(tables + (positions // block) * table_stride + row, mask=is_read, other=0)
        place = blocks * block + positions % block
        offsets = key_head.to(tl.int64) * head_stride + place[:, None] * size + places[None, :]
        is_key = is_read[:, None] & (places < size)[None, :]
        key = tl.load(keys + offsets, mask=is_key, other=0.0).to(tl.float32)
        value = tl.load(values + offsets, mask=is_key, other=0.0).to(tl.float32)
        scores = tl.dot(wanted, tl.trans(key), input_precision="tf32x3") * scaling
        scores = tl.where(is_read[None, :], scores, -float("inf"))
        # Every tile has a position that is read, so the greatest score is finite.
        greatest = tl.maximum(best, tl.max(scores, axis=1))
        kept, shares = tl.exp(best - greatest), tl.exp(scores - greatest[:, None])
        summed = summed * kept[:, None] + tl.dot(shares, value, input_precision="tf32x3")
        total = total * kept + tl.sum(shares, axis=1)
        best = greatest
    at = output + (row * num_heads + heads[:, None]) * size + places[None, :]
    tl.store(at, (summed / total[:, None]).to(output.dtype.element_ty), mask=is_query)
