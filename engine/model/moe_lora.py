"""The one definition of a stack's mathematics, and its serving form. Knows tensors, not files or requests.

Letters: T tokens, I in, O out, P projections that share an input, E experts, R rank, K active experts, S stacks in
a pack, C = sum of E*R over the stacks in a pack (rank rows), X = S * largest E (expert columns, padded).

Per projection (Brainstacks paper, section 3.1; Shazeer et al. 2017, section 2.1; rsLoRA, Kalajdzievski 2023):

    logits = x gateᵀ (+ softplus(x noiseᵀ) * N(0, 1) for the stack being trained, in train mode)
    g      = softmax over the K largest logits, 0 elsewhere
    delta  = s * sum_e g_e * B_e (A_e x),   s = alpha / sqrt(R)

Only the training form (`training_form.py`) has noise; a frozen stack is always computed by the serving form, which has
none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.model.inject import DeltaSource
from stack_store.format import INPUT_GROUPS, Geometry, GroupTensors, StackHeader

PANEL = 32  # columns of B that lie together in panelled stacks

MAX_MEMBERS = max(map(len, INPUT_GROUPS.values()))  # projections of an input group

GroupKey = tuple[int, str]  # layer, input group


@dataclass(frozen=True, slots=True)
class MoeLoraConfig:
    """The shape of a stack. Raises ValueError that names the field."""

    num_experts: int = 4
    rank: int = 16
    top_k: int = 2
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.rank < 1:
            raise ValueError(f"num_experts and rank must be positive, got {self.num_experts} and {self.rank}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts {self.num_experts}, got {self.top_k}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    @property
    def scale(self) -> float:
        """s = alpha / sqrt(R), the rank-stabilised scale."""
        return self.alpha / math.sqrt(self.rank)


def top_k_gate(logits: Tensor, top_k: int) -> Tensor:
    """(..., E) -> (..., E) in float32: softmax over the K largest logits, 0 elsewhere."""
    values, experts = logits.float().topk(top_k, dim=-1)  # (..., K) each
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, experts, values.softmax(dim=-1))


@dataclass(frozen=True, slots=True)
class ServingGroup:
    """The serving weights of one input group of one stack, or of several packed side by side."""

    a_and_gate: Tensor  # (P, C + X, I): a projection's rank rows, then its gates
    b: tuple[Tensor, ...]  # P tensors (C, O); of a panelled stack (C * O,), as `panels_of` orders them


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where an input group lies in the flat memory of any stack: `rank_rows * E*R + expert_rows * E` values in."""

    rank_rows: int
    expert_rows: int
    num_in: int
    num_out: tuple[int, ...]  # of each projection


def group_places(geometry: Geometry) -> dict[GroupKey, GroupPlace]:
    """The place of each layer's input groups; a group is A and gates of each projection in turn, then the B of each."""
    places: dict[GroupKey, GroupPlace] = {}
    rank_rows = expert_rows = 0
    for layer in range(geometry.num_layers):
        for group, members in INPUT_GROUPS.items():
            num_in, num_out = geometry.in_features(group), tuple(geometry.out_features(group))
            places[layer, group] = GroupPlace(rank_rows, expert_rows, num_in, num_out)
            rank_rows += len(members) * num_in + sum(num_out)
            expert_rows += len(members) * num_in
    return places


def value_offsets(geometry: Geometry, num_experts: int, rank: int) -> NDArray[np.int64]:
    """Where in a stack's flat memory its values begin: by layer and input group `a_and_gate`, then each b (L, 4, 4)."""
    rank_rows = num_experts * rank
    sizes = np.zeros((len(INPUT_GROUPS), 1 + MAX_MEMBERS), np.int64)
    for row, group in zip(sizes, INPUT_GROUPS, strict=True):
        outputs = geometry.out_features(group)
        row[0] = len(outputs) * (rank_rows + num_experts) * geometry.in_features(group)
        row[1 : 1 + len(outputs)] = [rank_rows * width for width in outputs]
    in_layer = np.cumsum(sizes).reshape(sizes.shape) - sizes
    return in_layer + sizes.sum() * np.arange(geometry.num_layers)[:, None, None]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ServingStack:
    """One frozen stack on the device, ready to be packed or, panelled, to be computed by the fused step."""

    domain: str
    round: int
    geometry: Geometry
    num_experts: int
    rank: int
    top_k: int
    scale: float
    is_panelled: bool
    memory: Tensor  # one flat tensor: by layer and input group a_and_gate, then b

    @classmethod
    def of(cls, header: StackHeader, memory: Tensor, *, panelled: bool) -> "ServingStack":
        """The stack that the memory holds."""
        return cls(
            domain=header.domain,
            round=header.round,
            geometry=header.geometry,
            num_experts=header.num_experts,
            rank=header.rank,
            top_k=header.top_k,
            scale=header.scale,
            is_panelled=panelled,
            memory=memory,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return self.memory.numel() * self.memory.element_size()

    def groups(self) -> dict[GroupKey, ServingGroup]:
        """Views of the memory by layer and input group, in paging order."""
        rank_rows, experts, shapes = self.num_experts * self.rank, self.num_experts, self.geometry.shapes
        used = 0

        def take(*shape: int) -> Tensor:
            nonlocal used
            start, used = used, used + math.prod(shape)
            return self.memory[start:used].view(shape)

        groups: dict[GroupKey, ServingGroup] = {}
        for layer in range(self.geometry.num_layers):
            for name, members in INPUT_GROUPS.items():
                a_and_gate = take(len(members), rank_rows + experts, shapes[members[0]][0])
                b = tuple(take(rank_rows, shapes[p][1]) for p in members)
                groups[layer, name] = ServingGroup(a_and_gate, tuple(map(torch.flatten, b)) if self.is_panelled else b)
        return groups


def panels_of(b: Tensor, num_experts: int) -> Tensor:
    """(E * R, O) -> (E * R * O,): expert by expert, PANEL columns of all its rows after the other.

    A thread that computes some of the columns reads them in one piece then. The last panel may have fewer columns.
    """
    experts = b.view(num_experts, -1, b.shape[1])
    return torch.cat([panel.flatten(1) for panel in torch.split(experts, PANEL, dim=2)], dim=1).flatten()


def serving_stack(
    header: StackHeader,
    groups: Mapping[GroupKey, GroupTensors],
    *,
    dtype: torch.dtype,
    device: torch.device,
    panelled: bool = False,
) -> ServingStack:
    """A stack file's tensors in the layout and dtype in which they are computed, in one allocation.

    On CUDA it is filled in pinned memory and copied at once, in the current stream, which the caller synchronises.
    """
    numel = sum(tensor.numel() for group in groups.values() for tensor in (group.a, group.gate, group.b))
    host = ServingStack.of(header, host_memory(numel, dtype, device), panelled=panelled)
    for key, group in host.groups().items():
        _fill(group, groups[key], header, panelled=panelled)
    return replace(host, memory=to_device(host.memory, device))


def host_memory(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Flat memory from which a copy to the device is fastest: on CUDA pinned."""
    return torch.empty(numel, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; on CUDA copied in the current stream, into memory of the default stream.

    Memory belongs to the stream it was allocated in, and only that stream gets it back when it is freed.
    """
    if device.type != "cuda":
        return host.to(device)
    default = torch.cuda.default_stream(device)
    with torch.cuda.stream(default):
        target = torch.empty_like(host, device=device)
    torch.cuda.current_stream(device).wait_stream(default)
    return target.copy_(host, non_blocking=True)


def _fill(group: ServingGroup, stored: GroupTensors, header: StackHeader, *, panelled: bool) -> None:
    p, rows, _ = group.a_and_gate.shape
    rank_rows = header.num_experts * header.rank
    group.a_and_gate[:, :rank_rows] = stored.a.view(p, rank_rows, -1)
    group.a_and_gate[:, rank_rows:] = stored.gate.view(p, rows - rank_rows, -1)
    widths = [b.numel() // rank_rows for b in group.b]
    for target, source in zip(group.b, torch.split(stored.b, widths, dim=1), strict=True):
        target.copy_(panels_of(source.contiguous(), header.num_experts) if panelled else source)


class StackPack:
    """Several stacks side by side: two products serve them all, whatever each row's mix.

    Experts are padded to the largest E, and stacks with fewer active experts than the largest K are masked, so
    stacks of any shape share a pack.
    """

    def __init__(self, stacks: Sequence[ServingStack]) -> None:
        if not stacks:
            raise ValueError("a pack needs at least one stack")
        if any(stack.is_panelled for stack in stacks):
            raise ValueError("a panelled stack cannot be packed")
        device = stacks[0].memory.device
        self.num_stacks = len(stacks)
        self.max_experts = max(stack.num_experts for stack in stacks)
        self.max_top_k = max(stack.top_k for stack in stacks)
        self.rank_rows = sum(stack.num_experts * stack.rank for stack in stacks)
        self.scales = torch.tensor([stack.scale for stack in stacks], device=device)  # (S,)
        self.expert_of_row = _expert_of_row(stacks, self.max_experts).to(device)  # (C,)
        self.stack_of_row = self.expert_of_row // self.max_experts  # (C,)
        self.no_expert = _padding_mask(stacks, self.max_experts, device)  # (S, E) or None
        self.no_choice = _choice_mask(stacks, self.max_top_k, device)  # (S, K) or None
        groups = [stack.groups() for stack in stacks]
        # One stack alone is used where it lies: nothing is copied.
        self.groups = (
            groups[0] if len(stacks) == 1 else {key: self._concatenate(stacks, groups, key) for key in groups[0]}
        )

    def _concatenate(
        self, stacks: Sequence[ServingStack], groups_of: Sequence[Mapping[GroupKey, ServingGroup]], key: GroupKey
    ) -> ServingGroup:
        groups = [(stack, groups[key]) for stack, groups in zip(stacks, groups_of, strict=True)]
        ranks = [group.a_and_gate[:, : stack.num_experts * stack.rank] for stack, group in groups]
        gates = [
            F.pad(
                group.a_and_gate[:, stack.num_experts * stack.rank :], (0, 0, 0, self.max_experts - stack.num_experts)
            )
            for stack, group in groups
        ]
        return ServingGroup(
            a_and_gate=torch.cat([*ranks, *gates], dim=1),
            b=tuple(torch.cat(columns) for columns in zip(*(group.b for _, group in groups), strict=True)),
        )

    def step(self, row_weights: Tensor) -> "PackStep":
        """Binds the pack to one batch. `row_weights` (T, S) float32 on the CPU: each token's weight of each stack.

        0 means that the token does not use the stack.
        """
        everybody = bool(row_weights.ne(0).all())  # known here, on the CPU: asking the device would wait for it
        weights = row_weights.to(self.scales.device)
        return PackStep(
            pack=self,
            scaled_weights=(weights * self.scales).unsqueeze(1).unsqueeze(-1),
            in_use=None if everybody else weights.ne(0)[:, self.stack_of_row].unsqueeze(1),
        )


class PackStep:
    """A pack and the weights of one batch's tokens.

    The wrapped projections of a group are called with the same tensor, one after the other; the A product of the first
    is kept for the others and forgotten with the last.
    """

    def __init__(self, pack: StackPack, scaled_weights: Tensor, in_use: Tensor | None) -> None:
        self.pack = pack
        self.scaled_weights = scaled_weights  # (T, 1, S, 1): row weight times scale
        self.in_use = in_use  # (T, 1, C) bool; None if every token uses every stack
        self._input: Tensor | None = None
        self._key: GroupKey | None = None
        self._mid: Tensor | None = None

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(..., O), (..., I) -> (..., O): y plus what the stacks add."""
        key = (layer, group)
        if self._input is not x or self._key != key or self._mid is None:
            self._input, self._key, self._mid = x, key, self.weighted_mid(x.reshape(-1, x.shape[-1]), key)
        mid = self._mid[index]
        members = self.pack.groups[key].b
        if index == len(members) - 1:
            self._input = self._key = self._mid = None
        return torch.addmm(y.view(-1, y.shape[-1]), mid, members[index]).view_as(y)

    def weighted_mid(self, x: Tensor, key: GroupKey) -> Tensor:
        """(T, I) -> (P, T, C): the A products of a group, times gate, scale and row weight."""
        pack = self.pack
        weights = pack.groups[key].a_and_gate  # (P, C + X, I)
        p, rows, _ = weights.shape
        products = F.linear(x, weights.view(p * rows, -1)).view(-1, p, rows)
        mid, logits = torch.split(products, [pack.rank_rows, rows - pack.rank_rows], dim=-1)
        gate = self._gate(logits.reshape(-1, p, pack.num_stacks, pack.max_experts))  # (T, P, S, E)
        factor = (gate * self.scaled_weights).flatten(2).to(x.dtype)  # (T, P, X)
        per_row = factor.index_select(-1, pack.expert_of_row)  # (T, P, C)
        weighted = mid * per_row
        if self.in_use is not None:
            # Not left to the product: 0 * inf would let a broken stack reach rows that do not use it.
            weighted = torch.where(self.in_use, weighted, 0.0)
        return weighted.transpose(0, 1)

    def _gate(self, logits: Tensor) -> Tensor:
        pack = self.pack
        logits = logits.float()
        if pack.no_expert is not None:
            logits = logits.masked_fill(pack.no_expert, -math.inf)
        values, experts = logits.topk(pack.max_top_k, dim=-1)  # (T, P, S, K) each
        if pack.no_choice is not None:
            values = values.masked_fill(pack.no_choice, -math.inf)
        return torch.zeros_like(logits).scatter(-1, experts, values.softmax(dim=-1))


class ServingDeltas:
    """The source of deltas while serving: what the current step adds."""

    def __init__(self) -> None:
        self.current: DeltaSource | None = None  # None: every row is the base alone

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(..., O), (..., I) -> (..., O): y plus the deltas of the current step."""
        return y if self.current is None else self.current.add_delta(y, x, layer, group, index)


def _expert_of_row(stacks: Sequence[ServingStack], max_experts: int) -> Tensor:
    columns = [
        index * max_experts + torch.arange(stack.num_experts).repeat_interleave(stack.rank)
        for index, stack in enumerate(stacks)
    ]
    return torch.cat(columns)


def _padding_mask(stacks: Sequence[ServingStack], max_experts: int, device: torch.device) -> Tensor | None:
    num_experts = torch.tensor([[stack.num_experts] for stack in stacks])
    mask = torch.arange(max_experts) >= num_experts
    return mask.to(device) if mask.any() else None


def _choice_mask(stacks: Sequence[ServingStack], max_top_k: int, device: torch.device) -> Tensor | None:
    top_k = torch.tensor([[stack.top_k] for stack in stacks])
    mask = torch.arange(max_top_k) >= top_k
    return mask.to(device) if mask.any() else None
