"""The fused decode step of a base on a CPU: what `fused_kernels` computes, on the engine's own tensors.

Chosen at start where it applies; `engine.runner` computes everything else by transformers' own code.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.base import Base
from engine.model.decoder_plan import DecoderPlan, plan_decoder
from engine.model.fused_kernels import count_together, decode
from engine.model.moe_lora import ServingStack
from stack_store.format import INPUT_GROUPS, Geometry

logger = logging.getLogger(__name__)

Array = NDArray[Any]

# Two of numba's parallel functions must not run at the same time under its plainest threading layer.
_one_at_a_time = threading.Lock()


class FusedDecoder:
    """Computes one token of each of several rows, each with its own stacks."""

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
        started = time.monotonic()
        self.logits([0], [0], [0], [{}])  # compiles, or reads what was compiled before; nobody uses the cache yet
        logger.info("fused decode ready threads=%d seconds=%.1f", self._threads, time.monotonic() - started)

    def logits(
        self,
        token_ids: Sequence[int],
        starts: Sequence[int],
        pasts: Sequence[int],
        mixes: Sequence[Mapping[ServingStack, float]],
    ) -> Tensor:
        """T tokens, each behind `pasts` others in the span at `starts`, each under its mix -> (T, V) float32."""
        base = self._base
        with torch.inference_mode():
            hidden = base.decoder.embed_tokens(torch.tensor(token_ids)).float()  # type: ignore[operator]
            cos, sin = self._rotations(torch.tensor([list(pasts)]))
        logits = torch.empty(len(token_ids), base.text_config.vocab_size)
        tokens = (array_of(hidden), cos, sin, np.array(starts), np.array(pasts))
        stacks = (*_pairs(mixes), *self._shapes)
        arrivals = np.zeros(1, np.int64)
        with _one_at_a_time:
            numba.set_num_threads(self._threads)
            decode(self._threads, arrivals, tokens, self._cache, self._decoder, stacks, array_of(logits))
        return logits

    def _rotations(self, positions: Tensor) -> tuple[Array, Array]:
        """(1, T) -> cosines and sines (rope kinds, T, D), rounded as transformers' own code rounds them."""
        like = torch.empty(0, dtype=self._base.dtype)
        pairs = [
            self._rotary(like, positions) if name is None else self._rotary(like, positions, name)
            for name in self._rope_names
        ]
        cos, sin = (array_of(torch.cat(parts).float()) for parts in zip(*pairs, strict=True))
        return cos, sin


def fused_decoder(base: Base, keys: Tensor, values: Tensor) -> FusedDecoder | None:
    """A fused decoder where there is one for this base and device."""
    plan = plan_decoder(base)
    return None if plan is None else FusedDecoder(base, plan, keys, values)


def _usable_threads(wanted: int) -> int:
    """As many threads as were wanted if they run side by side, else one."""
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)
    met = np.zeros(threads, np.bool_)
    with _one_at_a_time:
        numba.set_num_threads(threads)
        count_together(threads, np.zeros(1, np.int64), met)
    if met.all():
        return threads
    logger.warning("fused decode uses one thread: %d do not run side by side", threads)
    return 1


def array_of(tensor: Tensor) -> Array:
    """The tensor's own memory as the kernels read it: bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: Array = tensor.numpy()
    return array


def _group_shapes(geometry: Geometry) -> tuple[Array, Array, Array, Array]:
    """Inputs (4,), outputs (4,), number of projections (4,), and outputs of each projection (4, 3)."""
    shapes = geometry.shapes
    inputs = np.array([shapes[members[0]][0] for members in INPUT_GROUPS.values()])
    outputs = np.zeros((len(INPUT_GROUPS), max(map(len, INPUT_GROUPS.values()))), np.int64)
    for index, members in enumerate(INPUT_GROUPS.values()):
        outputs[index, : len(members)] = [shapes[name][1] for name in members]
    return inputs, outputs.sum(axis=1), np.array([len(members) for members in INPUT_GROUPS.values()]), outputs


def _pairs(mixes: Sequence[Mapping[ServingStack, float]]) -> tuple[Array, ...]:
    """Where each row's pairs begin (T + 1,); stack, row and weight of each (J,); the stacks' shapes (stacks, 4)."""
    numbers: dict[ServingStack, int] = {}
    start, stacks, of_rows, weights = [0], [], [], []
    for row, mix in enumerate(mixes):
        for stack, weight in mix.items():
            if weight != 0.0:
                stacks.append(numbers.setdefault(stack, len(numbers)))
                of_rows.append(row)
                weights.append(weight * stack.scale)
        start.append(len(stacks))
    shapes = [(stack.memory.data_ptr(), stack.num_experts, stack.rank, stack.top_k) for stack in numbers]
    return (
        np.array(start, np.int64),
        np.array(stacks, np.int64),
        np.array(of_rows, np.int64),
        np.array(weights, np.float32),
        np.array(shapes, np.int64).reshape(-1, 4),
    )
