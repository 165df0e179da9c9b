"""The fused step of a base on a CPU: what `fused_kernels` computes, on the engine's own tensors.

Chosen at start where it applies; `engine.runner` computes everything else by transformers' own code.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.block_table import BlockTable
from engine.model.base import Base
from engine.model.decoder_plan import DecoderPlan, plan_decoder
from engine.model.fused_kernels import BLOCKED_PAIRS, count_together, decode
from engine.model.moe_lora import MAX_MEMBERS, ServingStack, value_offsets
from stack_store.format import INPUT_GROUPS, Geometry

logger = logging.getLogger(__name__)

Array = NDArray[Any]

# Two of numba's parallel functions must not run at the same time under its plainest threading layer.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class FusedRow:
    """The next tokens of one sequence."""

    token_ids: Sequence[int]
    table: BlockTable  # where the sequence lies in the cache
    past: int  # its tokens that are in the cache
    mix: Mapping[ServingStack, float]
    wants_logits: bool  # behind its last token
    states_layer: int | None = None  # behind which the hidden states of all its tokens are wanted; 0: the embedding


@dataclass(frozen=True, slots=True)
class FusedOutput:
    """What a step gives back."""

    logits: Tensor  # (W, V) float32, behind the rows that want logits
    states: list[tuple[Tensor, Tensor]]  # of the rows that want them: (tokens, H) behind the layer, and the final norm


class FusedStep:
    """Computes a few tokens of each of several rows, each with its own stacks."""

    def __init__(self, base: Base, plan: DecoderPlan, keys: Tensor, values: Tensor) -> None:
        """`keys` and `values` (L, Hk, N, D) are the cache; it is written."""
        self._base = base
        self._rope_names = plan.rope_names
        self._rotary: Any = base.decoder.rotary_emb
        self._threads = _usable_threads(torch.get_num_threads())
        groups = tuple(INPUT_GROUPS)
        weights: list[Array] = []
        for name in groups:
            weights += [array_of(plan.weights[name]), array_of(plan.biases[name])]
        self._cache = (array_of(keys), array_of(values))
        self._decoder = (
            *weights,
            *(array_of(tensor) for tensor in (plan.norms, plan.head_norms, plan.final_norm, plan.head_weight)),
            np.array(plan.windows),
            np.array(plan.rope_kinds),
            np.float32(plan.eps),
            np.float32(plan.scaling),
            plan.is_gelu,
        )
        self._shapes = _group_shapes(base.geometry)
        self._addresses: WeakKeyDictionary[ServingStack, Array] = WeakKeyDictionary()
        started = time.monotonic()
        # Compiles, or reads what was compiled before. Nobody uses the cache yet.
        self.run([FusedRow([0], BlockTable.of([0]), 0, {}, True)])
        logger.info("fused step ready threads=%d seconds=%.1f", self._threads, time.monotonic() - started)

    def run(self, rows: Sequence[FusedRow]) -> FusedOutput:
        """Passes the rows' tokens through the model and writes their keys and values into the cache."""
        base = self._base
        pasts = [row.past + index for row in rows for index in range(len(row.token_ids))]
        ends = np.cumsum([len(row.token_ids) for row in rows])
        wanted = ends[[row.wants_logits for row in rows]] - 1
        with torch.inference_mode():
            ids = torch.tensor([token for row in rows for token in row.token_ids])
            hidden = base.decoder.embed_tokens(ids).float()  # type: ignore[operator]
            rotations = self._rotations(torch.tensor([pasts]))
        first_tokens = np.concatenate([[0], ends])
        tokens = (
            *(array_of(hidden), *rotations, np.array(pasts), first_tokens, *_places(rows), wanted),
            *_read_tokens(rows, first_tokens),
        )
        read = tokens[-1]
        states = torch.empty(2, len(read), hidden.shape[1], dtype=base.dtype)
        logits = torch.empty(len(wanted), base.text_config.vocab_size)
        arrivals = np.zeros(1, np.int64)
        with _one_at_a_time:
            numba.set_num_threads(self._threads)
            decode(
                self._threads, arrivals, tokens, self._cache, self._decoder, self._stacks(rows), array_of(logits),
                tuple(array_of(states)),
            )  # fmt: skip
        counts = [len(row.token_ids) for row in rows if row.states_layer is not None]
        of_layer, of_norm = (part.split(counts) for part in states)
        # The last layer's states are those behind the norm, as transformers counts.
        is_last = [row.states_layer == base.num_layers for row in rows if row.states_layer is not None]
        return FusedOutput(
            logits,
            [(norm if last else mid, norm) for mid, norm, last in zip(of_layer, of_norm, is_last, strict=True)],
        )

    def _stacks(self, rows: Sequence[FusedRow]) -> tuple[Array, ...]:
        """As `fused_kernels.decode` wants them."""
        in_use, pairs = _pairs(rows)
        for stack in in_use:
            if stack not in self._addresses:
                if not stack.is_panelled:
                    raise ValueError(f"the stack of {stack.domain!r}, round {stack.round}, is not panelled")
                self._addresses[stack] = _addresses(stack)
        shapes = [(stack.num_experts, stack.rank, stack.top_k) for stack in in_use]
        addresses = [self._addresses[stack] for stack in in_use] or [np.zeros((0, 0, 0), np.int64)]
        return (*pairs, np.array(shapes, np.int64).reshape(-1, 3), np.stack(addresses), *self._shapes)

    def _rotations(self, positions: Tensor) -> tuple[Array, Array]:
        """(1, T) -> cosines and sines (rope kinds, T, D), rounded as transformers' own code rounds them."""
        like = torch.empty(0, dtype=self._base.dtype)
        pairs = [
            self._rotary(like, positions) if name is None else self._rotary(like, positions, name)
            for name in self._rope_names
        ]
        cos, sin = (array_of(torch.cat(parts).float()) for parts in zip(*pairs, strict=True))
        return cos, sin


def make_fused_step(base: Base, keys: Tensor, values: Tensor) -> FusedStep | None:
    """A fused step where there is one for this base and device."""
    plan = plan_decoder(base)
    return None if plan is None else FusedStep(base, plan, keys, values)


def _usable_threads(wanted: int) -> int:
    """As many threads as were wanted if they run side by side, else one."""
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)
    met = np.zeros(threads, np.bool_)
    with _one_at_a_time:
        numba.set_num_threads(threads)
        count_together(threads, np.zeros(1, np.int64), met)
    if met.all():
        return threads
    logger.warning("fused step uses one thread: %d do not run side by side", threads)
    return 1


def array_of(tensor: Tensor) -> Array:
    """The tensor's own memory as the kernels read it: bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: Array = tensor.numpy()
    return array


def _group_shapes(geometry: Geometry) -> tuple[Array, Array]:
    """Of each input group the number of projections (4,), and the outputs of each (4, 3)."""
    outputs = np.zeros((len(INPUT_GROUPS), MAX_MEMBERS), np.int64)
    for index, members in enumerate(INPUT_GROUPS.values()):
        outputs[index, : len(members)] = [geometry.shapes[name][1] for name in members]
    return np.array([len(members) for members in INPUT_GROUPS.values()]), outputs


def _addresses(stack: ServingStack) -> Array:
    """Where a stack's weights lie: by layer and input group `a_and_gate`, then each b (L, 4, 4)."""
    offsets = value_offsets(stack.geometry, stack.num_experts, stack.rank)
    return stack.memory.data_ptr() + offsets * stack.memory.element_size()


def _read_tokens(rows: Sequence[FusedRow], first_tokens: Array) -> tuple[Array, Array]:
    """The tokens whose states are wanted, and behind which layer (S,) twice."""
    read = [
        (token, row.states_layer)
        for row, first in zip(rows, first_tokens, strict=False)
        if row.states_layer is not None
        for token in range(first, first + len(row.token_ids))
    ]
    tokens, layers = np.array(read, np.int64).reshape(-1, 2).T
    return np.ascontiguousarray(tokens), np.ascontiguousarray(layers)


def _places(rows: Sequence[FusedRow]) -> tuple[Array, Array, Array]:
    """Where in the cache each token goes (T,); where each row's pieces begin, and the last ends (Q + 1,); pieces."""
    places = [row.table.place(row.past + index) for row in rows for index in range(len(row.token_ids))]
    first_pieces = np.cumsum([0, *(len(row.table.pieces) for row in rows)])
    pieces = [(piece.start, piece.length) for row in rows for piece in row.table.pieces]
    return np.array(places), first_pieces, np.array(pieces)


def _pairs(rows: Sequence[FusedRow]) -> tuple[list[ServingStack], tuple[Array, ...]]:
    """The stacks in use; where blocks of their pairs begin and the last ends; stack, token and weight of each (J,).

    A token's pairs are computed in the order of their domains and rounds, which depends neither on the other rows nor
    on where the stacks lie.
    """
    uses: dict[ServingStack, list[tuple[int, float]]] = {}
    token = 0
    for row in rows:
        for stack, weight in row.mix.items():
            if weight != 0.0:
                tokens = range(token, token + len(row.token_ids))
                uses.setdefault(stack, []).extend((t, weight * stack.scale) for t in tokens)
        token += len(row.token_ids)
    in_use = sorted(uses, key=lambda stack: (stack.domain, stack.round))
    block_start, pair_stack, pairs = [0], list[int](), list[tuple[int, float]]()
    for number, stack in enumerate(in_use):
        pair_stack += [number] * len(uses[stack])
        pairs += uses[stack]
        block_start += [*range(block_start[-1] + BLOCKED_PAIRS, len(pairs), BLOCKED_PAIRS), len(pairs)]
    return in_use, (
        np.array(block_start, np.int64),
        np.array(pair_stack, np.int64),
        np.array([token for token, _ in pairs], np.int64),
        np.array([weight for _, weight in pairs], np.float32),
    )
