"""Makes the memory of a serving stack out of a stack file's bytes, in one pass. Knows two layouts, not files.

What it does is what `stack_store.format` and `moe_lora.serving_stack` do in many small steps; their result is the
definition, and the same bits. Compiled, and without Python's lock, because it runs beside the engine's steps.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.model.fused_kernels import narrowed, widened
from engine.model.fused_step import array_of
from engine.model.moe_lora import MAX_MEMBERS, PANEL, ServingStack, value_offsets
from stack_store.format import INPUT_GROUPS, PARTS, Geometry, StackHeader, Window

Array = NDArray[Any]
A, B, GATE, A_SCALE, B_SCALE = range(len(PARTS))


class StackUnpacking:
    """The way from one file's windows to one stack's memory."""

    def __init__(self, header: StackHeader, stack: ServingStack) -> None:
        """`stack` lies on the host, in float32 or bfloat16."""
        geometry = header.geometry
        self.stack = stack
        self._header = header
        self._memory = array_of(stack.memory)
        self._offsets = value_offsets(geometry, header.num_experts, header.rank)
        self._panel = PANEL if stack.is_panelled else max(width for _, width in geometry.shapes.values())
        self._shapes = _group_shapes(geometry)

    def take(self, window: Window, data: NDArray[np.uint8]) -> None:
        """Fills the memory of the window's layers."""
        header, whole = self._header, len(data) // 4 * 4
        floats, halves = data[:whole].view(np.float32), data[: len(data) // 2 * 2].view(np.uint16)
        values = data.view(np.int8) if header.weights == "int8" else halves
        layers = slice(window.first_layer, window.first_layer + len(window.parts))
        unpack(
            values, halves, floats, self._memory, window.parts, self._offsets[layers], *self._shapes,
            header.num_experts, header.rank, self._panel,
        )  # fmt: skip


def compile_unpacking(memory: Array) -> None:
    """Compiles for memory of that type, or reads what was compiled before, so that no load has to wait for it."""
    nothing, floats, halves = np.zeros((0, 4, 5), np.int64), np.zeros(1, np.float32), np.zeros(1, np.uint16)
    shapes = np.ones(4, np.int64), np.ones(4, np.int64), np.ones((4, MAX_MEMBERS), np.int64)
    for values in (np.zeros(1, np.int8), halves):
        unpack(values, halves, floats, memory, nothing, nothing, *shapes, 1, 1, 1)


def _group_shapes(geometry: Geometry) -> tuple[Array, Array, Array]:
    """Of each input group the number of projections (4,), its inputs (4,), and the outputs of each (4, 3)."""
    outputs = np.zeros((len(INPUT_GROUPS), MAX_MEMBERS), np.int64)
    for index, group in enumerate(INPUT_GROUPS):
        widths = geometry.out_features(group)
        outputs[index, : len(widths)] = widths
    inputs = np.array([geometry.in_features(group) for group in INPUT_GROUPS])
    return np.array([len(members) for members in INPUT_GROUPS.values()]), inputs, outputs


def stored(value: Any, scale: Any, like: Any) -> Any:
    """A value of a file as the array `like` holds it: int8 times its scale, bfloat16 (uint16) without one."""
    number = np.float32(value) * scale if isinstance(value, np.int8) else widened(value)
    return narrowed(number, like)


@overload(stored, inline="always")
def _stored(value: Any, scale: Any, like: Any) -> Any:
    def same(value: Any, scale: Any, like: Any) -> Any:
        return value

    def from_bfloat16(value: Any, scale: Any, like: Any) -> Any:
        return widened(value)

    def from_int8(value: Any, scale: Any, like: Any) -> Any:
        return narrowed(np.float32(value) * scale, like)

    if value == types.int8:
        return from_int8
    return from_bfloat16 if isinstance(like.dtype, types.Float) else same


@njit(nogil=True, cache=True)
def _move(values: Any, scale: Any, target: Any) -> None:
    for index in range(len(target)):
        target[index] = stored(values[index], scale, target)


@njit(nogil=True, cache=True)
def unpack(
    values: Any, halves: Any, floats: Any, memory: Any, parts: Any, offsets: Any, members: Any, inputs: Any,
    outputs: Any, num_experts: int, rank: int, panel: int,
) -> None:  # fmt: skip
    """Some layers of a file into the memory of a stack.

    `values`, `halves` and `floats` are the window's bytes as A and B, gates, and scales are stored; `parts` (layers, 4,
    5) says where in the window each begins, `offsets` (layers, 4, 4) where in the memory.
    """
    rank_rows = num_experts * rank
    value_bytes, one = values.itemsize, np.float32(1.0)
    for layer in range(len(parts)):
        for group in range(len(members)):
            part, offset, width, num = parts[layer, group], offsets[layer, group], inputs[group], members[group]
            a, gate = part[A] // value_bytes, part[GATE] // 2
            a_scale, b_scale, has_scales = part[A_SCALE] // 4, part[B_SCALE] // 4, part[A_SCALE] >= 0
            to = offset[0]
            for row in range(num * rank_rows):
                scale = floats[a_scale + row] if has_scales else one
                _move(values[a + row * width : a + (row + 1) * width], scale, memory[to : to + width])
                to += width
                if (row + 1) % rank_rows == 0:  # behind a projection's A come its gates
                    first, size = gate + row // rank_rows * num_experts * width, num_experts * width
                    _move(halves[first : first + size], one, memory[to : to + size])
                    to += size
            b, total = part[B] // value_bytes, outputs[group].sum()
            for projection in range(num):
                to, num_out = offset[1 + projection], outputs[group, projection]
                for expert in range(num_experts):
                    for begin in range(0, num_out, panel):
                        size = min(panel, num_out - begin)
                        for row in range(expert * rank, (expert + 1) * rank):
                            scale = floats[b_scale + row * num + projection] if has_scales else one
                            first = b + row * total + begin
                            _move(values[first : first + size], scale, memory[to : to + size])
                            to += size
                b += num_out
