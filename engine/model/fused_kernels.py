"""One step of a whole decoder for a few tokens, each with its own stacks, in one compiled function for CPUs.

Most of a decode step on a CPU is not arithmetic: it is a few thousand small operations. Here they are one call. The
mathematics is that of transformers' Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 layers and of `moe_lora.py`. Weights and
cache are as they are stored, what a product reads is rounded to the same type, sums and residuals are float32. Every
token is computed by itself, in an order of sums that no other token changes: it depends on its own sequence and stacks
only, bit for bit, and a token without stacks costs what the base costs.

All compiled code is in this one file: numba keeps it on disk and notices a change of the outermost function's file
only.

Letters: T tokens, Q sequences, W tokens whose logits are wanted, S tokens whose hidden states are wanted, L layers, H
hidden size, M MLP size, Hq and Hk query and key heads, G query heads of a key head, D head size, N cache positions, V
vocabulary, J pairs (a token and one of its stacks), E experts, R rank, K active experts.
"""

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from engine.model.moe_lora import PANEL

# Sums may be reordered, which is what vectorising them takes. NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}

VECTOR_BYTES = 64
LANES = 16  # float32 numbers of a vector
BLOCKED_TOKENS = 4  # from here on, two rows of weights at a time are faster than one
CACHED_TOKENS = 32  # whose activations stay in the nearest cache while a thread's weights pass by
BLOCKED_PAIRS = 32  # of one stack, that share the reading of its experts
FETCHED_PAIRS = 4  # up to here, reading a stack's weights is what takes the time
BLOCKED_QUERIES = 8  # that share one reading of keys and values
FETCHED_POSITIONS = 16  # of keys or values that do not lie behind those that are being read
SPINS = 10_000  # of a thread that waits for another, before it lets others have its core
MEETING_YIELDS = 1_000_000  # about a second

EXPERTS, RANK, TOP_K = range(3)  # columns of the stacks' shapes
MID, CHOSEN = 6, 7  # of the buffers that the threads share


# The next three have two forms: as Python they are what they mean, compiled they are chosen by the types of a call.


def widened(value: Any) -> Any:
    """A stored number as float32: bfloat16 travels as uint16."""
    return value if isinstance(value, np.floating) else np.uint32(int(value) << 16).view(np.float32)


@overload(widened, inline="always")
def _widened(value: Any) -> Any:
    def same(value: Any) -> Any:
        return value

    def from_bfloat16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    return same if isinstance(value, types.Float) else from_bfloat16


def narrowed(value: Any, like: Any) -> Any:
    """A float32 as the array `like` stores it; bfloat16 rounds to nearest, ties to even."""
    if like.dtype != np.uint16:
        return value
    return torch.tensor(float(value)).bfloat16().view(torch.int16).numpy().view(np.uint16)[()]


@overload(narrowed, inline="always")
def _narrowed(value: Any, like: Any) -> Any:
    def same(value: Any, like: Any) -> Any:
        return value

    def to_bfloat16(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # rounding must not make a NaN infinite
            return np.uint16(0x7FC0)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return same if isinstance(like.dtype, types.Float) else to_bfloat16


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), codegen


def memory_at(address: Any, size: Any, like: Any) -> Any:
    """`size` numbers from an address on, of the type that `like` has."""
    return np.frombuffer((ctypes.c_char * (size * like.itemsize)).from_address(address), like.dtype)


@overload(memory_at)
def _memory_at(address: Any, size: Any, like: Any) -> Any:
    dtype = np.float32 if isinstance(like.dtype, types.Float) else np.uint16

    def at(address: Any, size: Any, like: Any) -> Any:
        return carray(_pointer(address), size, dtype)

    return at


@njit(cache=True)
def _matrix_at(address: int, num_rows: int, num_columns: int, like: Any) -> Any:
    """The rows that begin at an address, of the type that `like` has."""
    return memory_at(address, num_rows * num_columns, like).reshape((num_rows, num_columns))


@njit(cache=True)
def _panels_at(address: int, num: int, rank: int, like: Any) -> Any:
    """The panels (num, R, PANEL) of an expert's B that begin at an address; see `moe_lora.panels_of`."""
    return memory_at(address, num * rank * PANEL, like).reshape((num, rank, PANEL))


@intrinsic
def _add_atomically(typing_context: Any, address: Any, value: Any) -> Any:
    """The number at an address before `value` was added to it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read_atomically(typing_context: Any, address: Any) -> Any:
    """The number at an address, with everything that was written before it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    """Lets another thread have the core."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, function_type, "sched_yield")
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(), codegen


@njit(cache=True)
def _wait_for_all(counter: int, threads: int, passed: int) -> int:
    """Returns when every thread has come as far as this one: how many barriers the thread has passed then.

    Spins, because the others are a few microseconds away, unless they are not running.
    """
    if threads > 1:
        _add_atomically(counter, 1)
        spins = 0
        while _read_atomically(counter) < threads * (passed + 1):
            spins += 1
            if spins > SPINS:
                _yield_processor()
    return passed + 1


_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS, _SHORTS = (ir.VectorType(lane, LANES) for lane in (_FLOAT, _INT32, ir.IntType(16)))
_FIRST, _ZEROS = _INT64(0), ir.Constant(_FLOATS, [0.0] * LANES)
# As assembly, which numba's own tools have no name for.
_DOT_PAIRS = ir.InlineAsm(ir.FunctionType(_FLOATS, [_FLOATS] * 3), "vdpbf16ps $3, $2, $0", "=v,0,v,v")
HAS_DOT_PAIRS = bool(llvm.get_host_cpu_features().get("avx512bf16"))
llvm.initialize_native_asmparser()


class _Rows:
    """The rows of an array from the `first`-th on, in generated code; each lies in one piece. `size` is the second
    axis's.
    """

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any, first: Any = _FIRST) -> None:
        view = context.make_array(array_type)(context, builder, array)
        self._builder = builder
        self._stride = cgutils.unpack_tuple(builder, view.strides)[0]
        self._start = builder.add(builder.ptrtoint(view.data, _INT64), builder.mul(first, self._stride))
        self.num_rows, self.size = cgutils.unpack_tuple(builder, view.shape)[:2]
        self.is_float = isinstance(array_type.dtype, types.Float)
        self.element_bytes = 4 if self.is_float else 2

    def address(self, row: Any, offset: Any) -> Any:
        """Of a row's byte."""
        row = _INT64(row) if isinstance(row, int) else row
        return self._builder.add(self._builder.add(self._start, self._builder.mul(row, self._stride)), offset)

    def load(self, row: Any, offset: Any, vector_type: Any) -> Any:
        """As many numbers as the vector has, from a byte of a row on."""
        loaded = self._builder.load(self._builder.inttoptr(self.address(row, offset), vector_type.as_pointer()))
        loaded.align = self.element_bytes
        return loaded

    def load_floats(self, row: Any, column: Any) -> Any:
        """16 numbers as float32."""
        offset = self._builder.mul(column, _INT64(self.element_bytes))
        if self.is_float:
            return self.load(row, offset, _FLOATS)
        bits = self._builder.zext(self.load(row, offset, _SHORTS), _INTS)
        return self._builder.bitcast(self._builder.shl(bits, ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    def store(self, row: Any, offset: Any, value: Any) -> None:
        """A float32 or a vector of them at a byte of a row."""
        pointer = self._builder.inttoptr(self.address(row, offset), value.type.as_pointer())
        self._builder.store(value, pointer).align = self.element_bytes


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    function_type = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.fma.v16f32"), [x, y, z])


def _add_dots(builder: Any, totals: Any, weights: Any, x: Any, is_float: bool, dot_pairs: bool) -> Any:
    """totals (16,) += 64 bytes of weights times 64 bytes of x; of bfloat16 two products go into each total."""
    if is_float:
        return _fma(builder, weights, x, totals)
    if dot_pairs:
        return builder.call(_DOT_PAIRS, [totals, weights, x])
    bits = [builder.bitcast(numbers, _INTS) for numbers in (weights, x)]
    low = [builder.bitcast(builder.shl(b, ir.Constant(_INTS, [16] * LANES)), _FLOATS) for b in bits]
    high = [builder.bitcast(builder.and_(b, ir.Constant(_INTS, [0xFFFF0000] * LANES)), _FLOATS) for b in bits]
    return _fma(builder, low[0], low[1], _fma(builder, high[0], high[1], totals))


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of up to 16 vectors, one in each lane. Adds lanes 8 apart, then 4, 2 and 1, however many vectors."""
    width = LANES // 2
    vectors = [vectors[min(number, len(vectors) - 1)] for number in range(LANES)]
    while width:
        starts = [side + start for start in range(0, LANES, 2 * width) for side in (0, LANES)]
        parts = [[start + lane + half for start in starts for lane in range(width)] for half in (0, width)]
        masks = [ir.Constant(_INTS, part) for part in parts]
        pairs = list(zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True))
        vectors = [builder.fadd(*(builder.shuffle_vector(*pair, mask) for mask in masks)) for pair in pairs]
        width //= 2
    return vectors[0]


def make_tile(num_rows: int, num_tokens: int, *, ahead: bool = False, dot_pairs: bool = HAS_DOT_PAIRS) -> Any:
    """A compiled function of (weights (O, I), x (T, I), out (T, O), row, token) with float32 sums.

    out[t, r] = x[t] times weights[r] for a few rows and tokens from `row` and `token` on, over the numbers that fill
    whole vectors of 64 bytes. All sums stay in registers, and each is made in the same order in every tile. With
    `ahead`, the weights of the tile after the next are fetched, as they lie in memory: processors foresee one row's
    reading, but not that of several.
    """

    @intrinsic
    def tile(typing_context: Any, weights: Any, x: Any, out: Any, row: Any, token: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first_row, first_token = arguments[3:]
            w, v, o = (
                _Rows(context, builder, array_type, array, first)
                for array_type, array, first in zip(
                    signature.args[:3], arguments[:3], (first_row, first_token, first_token), strict=True
                )
            )
            totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(num_rows)] for _ in range(num_tokens)]
            for total in (total for row in totals for total in row):
                builder.store(_ZEROS, total)
            whole = builder.and_(builder.mul(w.size, _INT64(w.element_bytes)), _INT64(-VECTOR_BYTES))
            with cgutils.for_range_slice(builder, _INT64(0), whole, _INT64(VECTOR_BYTES), _INT64) as (offset, _):
                if ahead:
                    start = builder.mul(offset, _INT64(num_rows))
                    for line in range(num_rows):
                        _prefetch(builder, w.address(2 * num_rows, builder.add(start, _INT64(line * VECTOR_BYTES))))
                loaded = [w.load(row, offset, _FLOATS) for row in range(num_rows)]
                for token in range(num_tokens):
                    of_token = v.load(token, offset, _FLOATS)
                    for row, total in enumerate(totals[token]):
                        added = _add_dots(builder, builder.load(total), loaded[row], of_token, w.is_float, dot_pairs)
                        builder.store(added, total)
            sums = _sums(builder, [builder.load(total) for row in totals for total in row])
            for number in range(num_rows * num_tokens):
                token, row = divmod(number, num_rows)
                offset = builder.mul(builder.add(first_row, _INT64(row)), _INT64(o.element_bytes))
                o.store(token, offset, builder.extract_element(sums, _INT32(number)))
            return context.get_dummy_value()

        return types.none(weights, x, out, types.int64, types.int64), codegen

    return tile


def _prefetch(builder: Any, address: Any) -> None:
    pointer_type = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [pointer_type, _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
    builder.call(function, [builder.inttoptr(address, pointer_type), _INT32(0), _INT32(3), _INT32(1)])


@intrinsic
def _fetch_line(typing_context: Any, address: Any) -> Any:
    """Asks for 64 bytes of memory without waiting for them."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@njit(cache=True)
def _fetch(rows: Any) -> None:
    """Asks for the memory of some rows (N, S) without waiting for it."""
    for n in range(rows.shape[0]):
        start = rows[n].ctypes.data
        for offset in range(0, rows.shape[1] * rows.itemsize, VECTOR_BYTES):
            _fetch_line(start + offset)


_tile_1x1, _tile_1x2, _tile_1x3 = (make_tile(1, tokens) for tokens in (1, 2, 3))
_tile_2x1, _tile_2x2, _tile_2x3, _tile_2x4, _tile_2x8 = (make_tile(2, tokens) for tokens in (1, 2, 3, 4, 8))
_tile_2x4_ahead, _tile_2x8_ahead = make_tile(2, 4, ahead=True), make_tile(2, 8, ahead=True)


def _add_rows(builder: Any, factors: Any, out: Any, totals: Any, columns: Any, num_rows: Any, load: Any) -> None:
    """Generates: out += factors times some rows, in the order of the rows; sums stay in registers.

    totals: of each output its row in `out`, and memory for a sum of each vector. columns: where each vector of the
    outputs begins. load(row, vector): 16 numbers of a row.
    """
    for output, sums in totals:
        for at, total in zip(columns, sums, strict=True):
            builder.store(out.load_floats(output, at), total)
    with cgutils.for_range(builder, num_rows) as loop:
        loaded = [load(loop.index, vector) for vector in range(len(columns))]
        for number, (_, sums) in enumerate(totals):
            at = builder.mul(loop.index, _INT64(factors.element_bytes))
            first_lane = builder.insert_element(_ZEROS, factors.load(number, at, _FLOAT), _INT32(0))
            factor = builder.shuffle_vector(first_lane, first_lane, ir.Constant(_INTS, [0] * LANES))
            for vector, total in zip(loaded, sums, strict=True):
                builder.store(_fma(builder, factor, vector, builder.load(total)), total)
    for output, sums in totals:
        for at, total in zip(columns, sums, strict=True):
            out.store(output, builder.mul(at, _INT64(out.element_bytes)), builder.load(total))


def _outputs(context: Any, builder: Any, places_type: Any, places: Any, first: Any, num: int, num_vectors: int) -> Any:
    """Of `num` outputs from the `first`-th place on: the place, and memory for a sum of each vector."""
    numbers = builder.gep(context.make_array(places_type)(context, builder, places).data, [first])
    return [
        (
            builder.load(builder.gep(numbers, [_INT64(number)])),
            [cgutils.alloca_once(builder, _FLOATS) for _ in range(num_vectors)],
        )
        for number in range(num)
    ]


def _make_panel_sum(num_outputs: int) -> Any:
    """A compiled function of (factors (N, P or more), panels (panels, P, PANEL), out, places (N,), n).

    out[places[i]] += the sum over p of factors[i, p] times the p-th row of every panel, in the order of p: for
    num_outputs of N from `n` on. The panels' columns lie side by side.
    """

    @intrinsic
    def panel_sum(typing_context: Any, factors: Any, panels: Any, out: Any, places: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first = arguments[4]
            f = _Rows(context, builder, factors, arguments[0], first)
            p = _Rows(context, builder, panels, arguments[1])
            o = _Rows(context, builder, out, arguments[2])
            num_vectors = PANEL // LANES
            totals = _outputs(context, builder, places, arguments[3], first, num_outputs, num_vectors)
            with cgutils.for_range(builder, p.num_rows) as panel:
                begin = builder.mul(panel.index, _INT64(PANEL))
                columns = [builder.add(begin, _INT64(LANES * vector)) for vector in range(num_vectors)]

                def load(row: Any, vector: int) -> Any:
                    column = builder.add(builder.mul(row, _INT64(PANEL)), _INT64(LANES * vector))
                    return p.load_floats(panel.index, column)

                _add_rows(builder, f, o, totals, columns, p.size, load)
            return context.get_dummy_value()

        return types.none(factors, panels, out, places, types.int64), codegen

    return panel_sum


def _make_weighted_sum(num_outputs: int, num_vectors: int) -> Any:
    """A compiled function of (factors (N, P or more), rows (P, S), out, places (N,), n, column).

    out[places[i]] += the sum over p of factors[i, p] times rows[p], in the order of p: for num_outputs of N from `n`
    on, and columns from `column` on, num_vectors times 16 of them at a time. Returns the first column that is left.
    """

    @intrinsic
    def weighted_sum(typing_context: Any, factors: Any, rows: Any, out: Any, places: Any, n: Any, column: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first, first_column = arguments[4:]
            starts = first, _INT64(0), _INT64(0)
            f, r, o = (
                _Rows(context, builder, *of) for of in zip(signature.args[:3], arguments[:3], starts, strict=True)
            )
            totals = _outputs(context, builder, places, arguments[3], first, num_outputs, num_vectors)
            width = _INT64(LANES * num_vectors)
            left = builder.srem(builder.sub(r.size, first_column), width)
            end = builder.sub(r.size, left)
            with cgutils.for_range_slice(builder, first_column, end, width, _INT64) as (begin, _):
                columns = [builder.add(begin, _INT64(LANES * vector)) for vector in range(num_vectors)]
                _add_rows(
                    builder, f, o, totals, columns, r.num_rows, lambda row, vector: r.load_floats(row, columns[vector])
                )
            return end

        return types.int64(factors, rows, out, places, types.int64, types.int64), codegen

    return weighted_sum


_weighted_4x4, _weighted_4x1 = _make_weighted_sum(4, 4), _make_weighted_sum(4, 1)
_weighted_2x8, _weighted_2x1 = _make_weighted_sum(2, 8), _make_weighted_sum(2, 1)
_weighted_1x16, _weighted_1x4, _weighted_1x1 = (_make_weighted_sum(1, vectors) for vectors in (16, 4, 1))


@njit(cache=True)
def _add_weighted(factors: Any, rows: Any, out: Any, places: Any) -> None:
    """out[places] += factors (N, P or more) times rows (P, S), in the order of p; all but the rows float32."""
    size, num = rows.shape[1], places.size
    n = 0
    while n < num:
        if n + 4 <= num:
            together = 4
            column = _weighted_4x4(factors, rows, out, places, n, 0)
            column = _weighted_4x1(factors, rows, out, places, n, column)
        elif n + 2 <= num:
            together = 2
            column = _weighted_2x8(factors, rows, out, places, n, 0)
            column = _weighted_2x1(factors, rows, out, places, n, column)
        else:
            together = 1
            column = _weighted_1x16(factors, rows, out, places, n, 0)
            column = _weighted_1x4(factors, rows, out, places, n, column)
            column = _weighted_1x1(factors, rows, out, places, n, column)
        if column < size:  # what fills no vector
            for number in range(n, n + together):
                for row in range(rows.shape[0]):
                    for at in range(column, size):
                        out[places[number], at] += factors[number, row] * widened(rows[row, at])
        n += together


_panels_4, _panels_2, _panels_1 = (_make_panel_sum(outputs) for outputs in (4, 2, 1))


@njit(cache=True)
def _add_panels(factors: Any, panels: Any, out: Any, places: Any) -> None:
    """out[places] += factors (N, P or more) times panels (panels, P, PANEL), which lie side by side."""
    num, n = places.size, 0
    while n + 4 <= num:
        _panels_4(factors, panels, out, places, n)
        n += 4
    if n + 2 <= num:
        _panels_2(factors, panels, out, places, n)
        n += 2
    if n < num:
        _panels_1(factors, panels, out, places, n)


@njit(cache=True)
def _product(weights: Any, first: int, last: int, x: Any, out: Any) -> None:
    """out[:, first:last] = x times rows `first` to `last` of the weights (O, I); x (T, I) of the weights' type."""
    tokens, size = x.shape
    for begin in range(0, tokens, CACHED_TOKENS):
        end = min(begin + CACHED_TOKENS, tokens)
        row = first
        if end - begin >= BLOCKED_TOKENS:
            while row + 2 <= last:
                if begin + 8 <= end:
                    _tile_2x8_ahead(weights, x, out, row, begin)
                    t = begin + 8
                else:
                    _tile_2x4_ahead(weights, x, out, row, begin)
                    t = begin + 4
                while t + 8 <= end:
                    _tile_2x8(weights, x, out, row, t)
                    t += 8
                if t + 4 <= end:
                    _tile_2x4(weights, x, out, row, t)
                    t += 4
                if t + 3 == end:
                    _tile_2x3(weights, x, out, row, t)
                elif t + 2 == end:
                    _tile_2x2(weights, x, out, row, t)
                elif t + 1 == end:
                    _tile_2x1(weights, x, out, row, t)
                row += 2
        while row < last:  # one row of weights after the other, as they lie in memory
            t = begin
            while t + 3 <= end:
                _tile_1x3(weights, x, out, row, t)
                t += 3
            if t + 2 == end:
                _tile_1x2(weights, x, out, row, t)
            elif t + 1 == end:
                _tile_1x1(weights, x, out, row, t)
            row += 1
    lanes = VECTOR_BYTES // weights.itemsize
    for i in range(size - size % lanes, size):  # what fills no vector
        for t in range(tokens):
            for column in range(first, last):
                out[t, column] += widened(weights[column, i]) * widened(x[t, i])


@njit(fastmath=FAST, cache=True, inline="always")
def _exp(x: Any) -> Any:
    """e to the power of x in float32, so plain that loops of it become vectors: Cephes' expf, to about 2 ulp.

    Beyond what float32 holds it gives the least normal and the largest numbers, of NaN NaN.
    """
    x = np.float32(-87.3) if x < np.float32(-87.3) else x
    x = np.float32(88.7) if x > np.float32(88.7) else x
    power = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    x = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = y * x * x + x + np.float32(1.0)
    # 2 to the power of 128 is no number: two halves of it are.
    half = np.int32(power) >> np.int32(1)
    rest = np.int32(power) - half
    low = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    high = np.int32((rest + np.int32(127)) << np.int32(23)).view(np.float32)
    return y * low * high


@njit(fastmath=FAST, cache=True)
def _normed(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Root mean square norm of every row (Zhang and Sennrich 2019), rounded to what `out` stores."""
    rows, size = x.shape
    for t in range(rows):
        squares = np.float32(0.0)
        for i in range(size):
            squares += x[t, i] * x[t, i]
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[t, i] = narrowed(x[t, i] * factor * weight[i], out)


@njit(fastmath=FAST, cache=True)
def _normed_head(x: Any, weight: Any, eps: float) -> None:
    """The norm of one head, in place; none without a weight."""
    if weight.size == 0:
        return
    squares = np.float32(0.0)
    for i in range(x.size):
        squares += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(squares / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        x[i] = x[i] * factor * weight[i]


@njit(fastmath=FAST, cache=True)
def _rotated(x: Any, cos: Any, sin: Any) -> None:
    """Rotary position embedding of one head, in place: halves are paired, as in transformers."""
    half = x.size // 2
    for i in range(half):
        low, high = x[i], x[i + half]
        x[i] = low * cos[i] - high * sin[i]
        x[i + half] = high * cos[i + half] + low * sin[i + half]


@njit(fastmath=FAST, cache=True, inline="always")
def _gelu(x: float) -> float:
    """The tanh form."""
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    return x - x / (_exp(inner + inner) + np.float32(1.0))


@njit(fastmath=FAST, cache=True, inline="always")
def _silu(x: float) -> float:
    return x / (np.float32(1.0) + _exp(-x))


@njit(fastmath=FAST, cache=True)
def _activate(gate: Any, up: Any, is_gelu: bool, out: Any) -> None:
    """out = the activation of `gate`, times `up`."""
    if is_gelu:
        for i in range(gate.size):
            out[i] = narrowed(_gelu(gate[i]) * up[i], out)
    else:
        for i in range(gate.size):
            out[i] = narrowed(_silu(gate[i]) * up[i], out)


@njit(fastmath=FAST, cache=True)
def _copy(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = narrowed(source[i], target)


@njit(fastmath=FAST, cache=True)
def _place_heads(
    head: int, qkv: Any, norms: Any, cos: Any, sin: Any, key_place: Any, value_place: Any, eps: float, queries: Any
) -> None:
    """One token and one key head: its key and value into the cache, and its queries behind each other.

    qkv (Hq D + 2 Hk D,), norms (2, D or 0), cos and sin (D,), the places in the cache (D,), queries (G, D).
    """
    group, size = queries.shape
    num_heads = qkv.size // size  # of queries, keys and values: Hk (G + 2)
    num_key_heads = num_heads // (group + 2)
    key_at = (num_key_heads * group + head) * size
    key = qkv[key_at : key_at + size]
    _normed_head(key, norms[1], eps)
    _rotated(key, cos, sin)
    _copy(key, key_place)
    value_at = key_at + num_key_heads * size
    _copy(qkv[value_at : value_at + size], value_place)
    for g in range(group):
        query = qkv[(head * group + g) * size : (head * group + g + 1) * size]
        _normed_head(query, norms[0], eps)
        _rotated(query, cos, sin)
        _copy(query, queries[g])


@intrinsic
def _maxima(typing_context: Any, numbers: Any, vectors: Any, out: Any) -> Any:
    """out (16,) = the largest number in each lane of some vectors of float32. May overlook a NaN.

    Generated because a loop that finds a maximum is not made of vectors by itself.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, target = (
            builder.ptrtoint(context.make_array(array_type)(context, builder, array).data, _INT64)
            for array_type, array in ((numbers, arguments[0]), (out, arguments[2]))
        )
        pointer_type, largest = _FLOATS.as_pointer(), cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, [-np.inf] * LANES), largest)
        with cgutils.for_range(builder, arguments[1]) as loop:
            address = builder.add(start, builder.mul(loop.index, _INT64(VECTOR_BYTES)))
            loaded, before = builder.load(builder.inttoptr(address, pointer_type)), builder.load(largest)
            loaded.align = 4
            is_larger = builder.fcmp_ordered(">", loaded, before)
            builder.store(builder.select(is_larger, loaded, before), largest)
        builder.store(builder.load(largest), builder.inttoptr(target, pointer_type)).align = 4
        return context.get_dummy_value()

    return types.none(numbers, types.int64, out), codegen


@njit(cache=True)
def _largest(numbers: Any, scratch: Any) -> float:
    """The largest number; scratch (16,). May overlook a NaN, which the sum of a softmax does not."""
    vectors = numbers.size // LANES
    _maxima(numbers, vectors, scratch)
    largest = scratch[0]
    for lane in range(1, LANES):
        largest = max(largest, scratch[lane])
    for i in range(vectors * LANES, numbers.size):
        largest = max(largest, numbers[i])
    return largest


@njit(fastmath=FAST, cache=True)
def _exponentials(scores: Any, scaling: float, scratch: Any) -> Any:
    """Replaces scores by what a softmax divides by their sum, which it returns."""
    largest, total = _largest(scores, scratch), np.float32(0.0)
    for i in range(scores.size):
        share = _exp((scores[i] - largest) * scaling)
        scores[i] = share
        total += share
    return total


@njit(cache=True)
def _cut_pieces(pieces: Any, begin: int, end: int, parts: Any) -> int:
    """How many pieces (P, 2) hold a sequence's positions from `begin` to `end`. Writes start and length in the cache of
    what they hold of them into parts (P, 2).
    """
    count, at = 0, 0  # positions of the sequence that come before the piece
    for piece in range(pieces.shape[0]):
        start, length = pieces[piece]
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            parts[count, 0], parts[count, 1] = start + low, high - low
            count += 1
        at += length
    return count


@njit(cache=True)
def _fetch_part(cache: Any, parts: Any, part: int) -> None:
    """Asks for the beginning of a part: processors foresee how a part goes on, not where the next one lies."""
    if part < parts.shape[0]:
        start, length = parts[part]
        _fetch(cache[start : start + min(length, FETCHED_POSITIONS)])


@njit(fastmath=FAST, cache=True)
def _attend(
    first: int,
    queries: Any,
    group: int,
    pasts: Any,
    window: int,
    pieces: Any,
    keys: Any,
    values: Any,
    scaling: float,
    scratch: Any,
    out: Any,
) -> None:
    """Some queries of one sequence and key head, from the first-th on, over what each sees.

    queries (n, D); pasts and out (T, G D) of the sequence's tokens, of which query q belongs to the (q // G)-th; the
    sequence's pieces (P, 2) of keys and values (N, D).
    """
    num, size = queries.shape
    scores, sums, numbers, lanes, all_parts = scratch
    last_past, begin = pasts[(first + num - 1) // group], 0
    if window:
        begin = max(0, pasts[first // group] + 1 - window)
    end = last_past + 1
    parts = all_parts[: _cut_pieces(pieces, begin, end, all_parts)]
    at = 0
    for part in range(parts.shape[0]):
        start, length = parts[part]
        _fetch_part(keys, parts, part + 1)
        _product(keys[start : start + length], 0, length, queries, scores[:, at:])
        at += length
    sums[:num] = np.float32(0.0)
    for n in range(num):
        past = pasts[(first + n) // group]
        low = max(0, past + 1 - window) - begin if window else 0
        high = past + 1 - begin
        total = _exponentials(scores[n, low:high], scaling, lanes)
        scores[n, :low] = np.float32(0.0)
        scores[n, high : end - begin] = np.float32(0.0)
        for m in range(low, high):
            scores[n, m] /= total
    at = 0
    for part in range(parts.shape[0]):
        start, length = parts[part]
        _fetch_part(values, parts, part + 1)
        _add_weighted(scores[:, at:], values[start : start + length], sums, numbers[:num])
        at += length
    for n in range(num):
        token, g = (first + n) // group, (first + n) % group
        _copy(sums[n], out[token, g * size : (g + 1) * size])


@njit(cache=True)
def _num_blocks(first_tokens: Any, group: int, queries: int) -> int:
    """Blocks of queries of one key head in a step."""
    num_blocks = 0
    for sequence in range(first_tokens.size - 1):
        num_queries = (first_tokens[sequence + 1] - first_tokens[sequence]) * group
        num_blocks += (num_queries + queries - 1) // queries
    return num_blocks


@njit(cache=True)
def _attend_part(
    thread: int,
    threads: int,
    tokens: Any,
    keys: Any,
    values: Any,
    window: int,
    scaling: float,
    queries: Any,
    scratch: Any,
    attended: Any,
) -> None:
    """A thread's share of a layer's attention. queries (Hk, T G, D), keys and values (Hk, N, D), attended (T, Hq D)."""
    _, _, _, pasts, first_tokens, _, first_pieces, pieces, _, _, _ = tokens
    num_key_heads, _, size = queries.shape
    group = queries.shape[1] // pasts.size
    # Few sequences: small blocks, so that no thread waits long for another.
    is_many = _num_blocks(first_tokens, group, BLOCKED_QUERIES) * num_key_heads >= 4 * threads
    block = BLOCKED_QUERIES if is_many else 1
    item = 0
    for sequence in range(first_tokens.size - 1):
        begin, end = first_tokens[sequence], first_tokens[sequence + 1]
        of_sequence = pieces[first_pieces[sequence] : first_pieces[sequence + 1]]
        for head in range(num_key_heads):
            for first in range(0, (end - begin) * group, block):
                item += 1
                if item % threads != thread:
                    continue
                last = min(first + block, (end - begin) * group)
                _attend(
                    first, queries[head, begin * group + first : begin * group + last], group, pasts[begin:end],
                    window, of_sequence, keys[head], values[head], scaling, scratch,
                    attended[begin:end, head * group * size : (head + 1) * group * size],
                )  # fmt: skip


@njit(cache=True)
def _likeliest(logits: Any, experts: Any) -> None:
    """The experts of a gate's largest logits, the likeliest first; of equal ones the first is the likelier."""
    for k in range(experts.size):
        best = -1
        for e in range(logits.size):
            is_taken = False
            for before in range(k):
                is_taken |= experts[before] == e
            if not is_taken and (best < 0 or logits[e] > logits[best]):
                best = e
        experts[k] = best


@njit(cache=True)
def _pairs_of_expert(chosen: Any, first_place: int, last_place: int, expert: int, pairs: Any, places: Any) -> int:
    """How many pairs chose an expert at these places; chosen (J, K). Writes which ones, and where."""
    count = 0
    for pair in range(chosen.shape[0]):
        for place in range(first_place, last_place):
            if chosen[pair, place] == expert:
                pairs[count], places[count] = pair, place
                count += 1
    return count


@njit(cache=True)
def _rows_at(memory: Any, num: int, size: int) -> Any:
    return memory[: num * size].reshape((num, size))


@njit(cache=True)
def _rows_of(rows: Any, places: Any) -> Any:
    """rows[places]."""
    picked = np.empty((places.size, rows.shape[1]), rows.dtype)
    _gather(rows, places, picked)
    return picked


@njit(cache=True)
def _copy_states(hidden: Any, layer: int, read: Any, read_layers: Any, out: Any) -> None:
    """out (S, H) = the hidden states of those tokens that are read before this layer."""
    for s in range(read.size):
        if read_layers[s] == layer:
            _copy(hidden[read[s]], out[s])


@njit(cache=True)
def _gather(rows: Any, places: Any, out: Any) -> None:
    """out = rows[places]."""
    for n in range(places.size):
        source, target = rows[places[n]], out[n]
        for i in range(source.size):
            target[i] = source[i]


@njit(cache=True)
def _expert_products(
    x: Any,
    block: int,
    layer: int,
    group: int,
    member: int,
    first_place: int,
    last_place: int,
    stacks: Any,
    scratch: Any,
    shared: Any,
) -> None:
    """The gates of one projection for a block of pairs, and A products of their experts, times gate and scale.

    x (T, I). Of each pair's chosen experts those from `first_place` to `last_place`. Writes the experts, and their
    products (R,) each.
    """
    block_start, pair_stack, pair_token, pair_weight, shapes, addresses, _, _ = stacks
    first, last = block_start[block], block_start[block + 1]
    stack, num, size = pair_stack[first], last - first, x.shape[1]
    experts, rank, top_k = shapes[stack, EXPERTS], shapes[stack, RANK], shapes[stack, TOP_K]
    mid, chosen = shared[MID][first:last, member], shared[CHOSEN][first:last, member]
    factors, dots, pairs, places, picked, memory, memory_of_expert = scratch
    gates, num_rows = experts * rank, experts * rank + experts
    address = addresses[stack, layer, group, 0] + member * num_rows * size * x.itemsize
    weights = _matrix_at(address, num_rows, size, x)
    tokens = x[pair_token[first] : pair_token[first] + num]
    if pair_token[last - 1] - pair_token[first] != num - 1:  # not one behind the other
        tokens = _rows_at(memory, num, size)
        _gather(x, pair_token[first:last], tokens)
    _product(weights, gates, num_rows, tokens, dots)
    for n in range(num):
        logits = dots[n, gates:num_rows]
        _likeliest(logits, picked[:top_k])
        total = np.float32(0.0)
        for k in range(top_k):
            total += _exp(logits[picked[k]] - logits[picked[0]])
        for k in range(first_place, min(last_place, top_k)):
            chosen[n, k] = picked[k]
            factors[n, k] = pair_weight[first + n] * _exp(logits[picked[k]] - logits[picked[0]]) / total
    for expert in range(experts):
        count = _pairs_of_expert(chosen, first_place, min(last_place, top_k), expert, pairs, places)
        if count == 0:
            continue
        of_expert = _rows_at(memory_of_expert, count, size)
        _gather(tokens, pairs[:count], of_expert)
        begin = expert * rank
        _product(weights, begin, begin + rank, of_expert, dots)
        for n in range(count):
            factor = factors[pairs[n], places[n]]
            for r in range(rank):
                mid[pairs[n], places[n], r] = factor * dots[n, begin + r]


@njit(cache=True)
def _choose_experts(
    thread: int, threads: int, layer: int, group: int, x: Any, stacks: Any, scratch: Any, shared: Any
) -> None:
    """A thread's part of the gates and A products of one input group, x (T, I)."""
    max_top_k, num_members, num_blocks = shared[MID].shape[2], stacks[6][group], stacks[0].size - 1
    # A gate is computed once for all chosen experts, unless there are too few of them to go round.
    parts = max_top_k if num_blocks * num_members < 2 * threads else 1
    for item in range(thread, num_blocks * num_members * parts, threads):
        block, member, part = item // (num_members * parts), item // parts % num_members, item % parts
        first_place, last_place = (part, part + 1) if parts > 1 else (0, max_top_k)
        _expert_products(x, block, layer, group, member, first_place, last_place, stacks, scratch, shared)


@njit(cache=True)
def _fetch_deltas(
    first: int, last: int, layer: int, group: int, member: int, stacks: Any, like: Any, scratch: Any, shared: Any
) -> None:
    """Asks for what `_add_deltas` will read, so that it comes while the base's products run."""
    block_start, pair_stack, _, _, shapes, addresses, _, member_outputs = stacks
    _, _, pairs, places, _, _, _ = scratch
    if pair_stack.size <= FETCHED_PAIRS:
        return
    width, fetched = member_outputs[group, member], -1
    for block in range(block_start.size - 1):
        begin, end = block_start[block], block_start[block + 1]
        stack, chosen = pair_stack[begin], shared[CHOSEN][begin:end, member]
        experts, rank, top_k = shapes[stack, EXPERTS], shapes[stack, RANK], shapes[stack, TOP_K]
        if stack == fetched:  # by the block before, which needs the same experts as likely as not
            continue
        fetched = stack
        for expert in range(experts):
            if _pairs_of_expert(chosen, 0, top_k, expert, pairs, places):
                address = addresses[stack, layer, group, 1 + member] + rank * (expert * width + first) * like.itemsize
                _fetch(_matrix_at(address, rank, last - first, like))


@njit(cache=True)
def _add_deltas(
    out: Any,
    at: int,
    first: int,
    last: int,
    layer: int,
    group: int,
    member: int,
    stacks: Any,
    like: Any,
    scratch: Any,
    shared: Any,
) -> None:
    """out (T, O) += mid B for the columns `first` to `last` of one projection, which begins at column `at`.

    Only the chosen experts' rows of B are read.
    """
    block_start, pair_stack, pair_token, _, shapes, addresses, _, member_outputs = stacks
    _, dots, pairs, places, _, _, _ = scratch
    width = member_outputs[group, member]
    columns = out[:, at + first : at + last]
    for block in range(block_start.size - 1):
        begin, end = block_start[block], block_start[block + 1]
        mid, chosen = shared[MID][begin:end, member], shared[CHOSEN][begin:end, member]
        stack = pair_stack[begin]
        experts, rank, top_k = shapes[stack, EXPERTS], shapes[stack, RANK], shapes[stack, TOP_K]
        for expert in range(experts):
            address = addresses[stack, layer, group, 1 + member] + rank * (expert * width + first) * like.itemsize
            count = _pairs_of_expert(chosen, 0, top_k, expert, pairs, places)
            for n in range(count):
                for r in range(rank):
                    dots[n, r] = mid[pairs[n], places[n], r]
                pairs[n] = pair_token[begin + pairs[n]]
            if count:
                panels = (last - first) // PANEL
                _add_panels(dots, _panels_at(address, panels, rank, like), columns, pairs[:count])
                rest = columns[:, panels * PANEL :]
                if rest.shape[1]:
                    address += panels * PANEL * rank * like.itemsize
                    _add_weighted(dots, _matrix_at(address, rank, rest.shape[1], like), rest, pairs[:count])


@njit(cache=True)
def _share(part: int, parts: int, size: int) -> tuple[int, int]:
    """The part-th of `parts` ranges that cover `size` columns, each a multiple of PANEL long but for the last."""
    blocks = (size + PANEL - 1) // PANEL
    return min(blocks * part // parts * PANEL, size), min(blocks * (part + 1) // parts * PANEL, size)


@njit(fastmath=FAST, cache=True)
def _project(
    thread: int,
    threads: int,
    weights: Any,
    bias: Any,
    layer: int,
    group: int,
    x: Any,
    out: Any,
    stacks: Any,
    scratch: Any,
    shared: Any,
) -> None:
    """A thread's columns of every projection of one input group: out (T, O) = x W + bias + the stacks' deltas."""
    _, pair_stack, _, _, _, _, members, member_outputs = stacks
    at = 0
    for member in range(members[group]):
        first, last = _share(thread, threads, member_outputs[group, member])
        _fetch_deltas(first, last, layer, group, member, stacks, weights, scratch, shared)
        _product(weights[layer], at + first, at + last, x, out)
        if bias.shape[1]:
            for t in range(out.shape[0]):
                for column in range(at + first, at + last):
                    out[t, column] += bias[layer, column]
        if pair_stack.size and first < last:
            _add_deltas(out, at, first, last, layer, group, member, stacks, weights, scratch, shared)
        at += member_outputs[group, member]


@njit(fastmath=FAST, cache=True)
def _add_branch(hidden: Any, added: Any, norms: Any, place: int, eps: float, scratch: Any) -> None:
    """hidden (T, H) += what attention or MLP made of it; where a layer has four norms, through norm `place`."""
    branch = added
    if norms.shape[0] == 4:
        _normed(added, norms[place], eps, scratch)
        branch = scratch
    rows, size = hidden.shape
    for t in range(rows):
        for i in range(size):
            hidden[t, i] += branch[t, i]


@njit(fastmath=FAST, cache=True)
def _decode_part(
    thread: int,
    threads: int,
    arrivals: Any,
    tokens: Any,
    cache: Any,
    decoder: Any,
    stacks: Any,
    shared: Any,
    logits: Any,
    states: Any,
) -> None:
    """What one of the threads does in a step. All of them walk through the same phases and wait for each other."""
    embedded, cos, sin, pasts, _, places, _, pieces, wanted, read, read_layers = tokens
    keys, values = cache
    qkv_weight, qkv_bias, o_weight, o_bias, gate_up_weight, gate_up_bias, down_weight, down_bias = decoder[:8]
    norms, head_norms, final_norm, head_weight, windows, rope_kinds, eps, scaling, is_gelu = decoder[8:]
    qkv, queries, attended, gate_up, activated, added, _, _ = shared
    counter = arrivals.ctypes.data
    rows, size = embedded.shape
    num_layers, num_key_heads, _, _ = keys.shape
    num_mlp, group_size = activated.shape[1], queries.shape[1] // rows
    has_stacks = stacks[1].size > 0
    before_mlp = norms.shape[1] // 2  # the norms: before attention, [behind it,] before the MLP[, behind it]
    hidden = embedded.copy()  # every thread has its own: to add is cheaper than to wait
    normed = np.empty(hidden.shape, head_weight.dtype)
    branch = np.empty_like(hidden)
    shapes = stacks[4]
    max_rows, longest = 1, 0
    for stack in range(shapes.shape[0]):
        max_rows = max(max_rows, shapes[stack, EXPERTS] * (shapes[stack, RANK] + 1))
    for t in range(rows):
        longest = max(longest, pasts[t] + 1)
    _, _, max_top_k, max_rank = shared[MID].shape
    widest = max(size, num_mlp, attended.shape[1])
    of_experts = (
        np.empty((BLOCKED_PAIRS, max_top_k), np.float32),
        np.empty((BLOCKED_PAIRS, max(max_rows, max_rank)), np.float32),
        np.empty(BLOCKED_PAIRS, np.int64),
        np.empty(BLOCKED_PAIRS, np.int64),
        np.empty(max_top_k, np.int64),
        np.empty(BLOCKED_PAIRS * widest, head_weight.dtype),
        np.empty(BLOCKED_PAIRS * widest, head_weight.dtype),
    )
    of_attention = (
        np.empty((BLOCKED_QUERIES, longest), np.float32),
        np.empty((BLOCKED_QUERIES, keys.shape[3]), np.float32),
        np.arange(BLOCKED_QUERIES),
        np.empty(LANES, np.float32),
        np.empty_like(pieces),
    )
    passed = 0
    for layer in range(num_layers):
        if thread == 0:
            _copy_states(hidden, layer, read, read_layers, states[0])
        _normed(hidden, norms[layer, 0], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 0, normed, stacks, of_experts, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, qkv_weight, qkv_bias, layer, 0, normed, qkv, stacks, of_experts, shared)
        passed = _wait_for_all(counter, threads, passed)
        kind = rope_kinds[layer]
        for item in range(thread, rows * num_key_heads, threads):
            t, head = item // num_key_heads, item % num_key_heads
            place = places[t]
            _place_heads(
                head, qkv[t], head_norms[layer], cos[kind, t], sin[kind, t], keys[layer, head, place],
                values[layer, head, place], eps, queries[head, t * group_size : (t + 1) * group_size],
            )  # fmt: skip
        passed = _wait_for_all(counter, threads, passed)
        _attend_part(
            thread, threads, tokens, keys[layer], values[layer], windows[layer], scaling, queries, of_attention,
            attended,
        )  # fmt: skip
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 1, attended, stacks, of_experts, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, o_weight, o_bias, layer, 1, attended, added, stacks, of_experts, shared)
        passed = _wait_for_all(counter, threads, passed)
        _add_branch(hidden, added, norms[layer], 1, eps, branch)
        _normed(hidden, norms[layer, before_mlp], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 2, normed, stacks, of_experts, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, gate_up_weight, gate_up_bias, layer, 2, normed, gate_up, stacks, of_experts, shared)
        first, last = _share(thread, threads, num_mlp)  # the same columns of gate and of up are this thread's
        for t in range(rows):
            up = gate_up[t, num_mlp + first : num_mlp + last]
            _activate(gate_up[t, first:last], up, is_gelu, activated[t, first:last])
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 3, activated, stacks, of_experts, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, down_weight, down_bias, layer, 3, activated, added, stacks, of_experts, shared)
        passed = _wait_for_all(counter, threads, passed)
        _add_branch(hidden, added, norms[layer], 3, eps, branch)
    if thread == 0:
        _normed(_rows_of(hidden, read), final_norm[0], eps, states[1])
    last_normed = np.empty((wanted.size, size), head_weight.dtype)
    _normed(_rows_of(hidden, wanted), final_norm[0], eps, last_normed)
    first, last = _share(thread, threads, head_weight.shape[0])
    _product(head_weight, first, last, last_normed, logits)


@njit(parallel=True, cache=True, nogil=True)
def count_together(threads: int, arrivals: Any, met: Any) -> None:
    """Sets met[i] for each of `threads` threads that saw all others run beside it. `arrivals` (1,) is 0.

    A step's threads wait for each other, so they must really run side by side.
    """
    for thread in prange(threads):
        counter = arrivals.ctypes.data
        _add_atomically(counter, 1)
        for _ in range(MEETING_YIELDS):
            if _read_atomically(counter) == threads:
                met[thread] = True
                break
            _yield_processor()


@njit(parallel=True, cache=True, nogil=True)
def decode(
    threads: int, arrivals: Any, tokens: Any, cache: Any, decoder: Any, stacks: Any, logits: Any, states: Any
) -> None:
    """Writes the keys and values of T tokens into the cache, and logits that follow some of them into `logits` (W, V).

    Of tokens whose hidden states are wanted, writes those before a layer, and behind the final norm, into `states`
    (S, H) twice.

    arrivals: (1,), 0.
    tokens: embedded (T, H); cosines and sines (rope kinds, T, D); how many tokens of its sequence precede each (T,);
        where each sequence's tokens begin (Q + 1,); each token's position in the cache (T,); where each sequence's
        pieces of the cache begin (Q + 1,); start and length of the pieces (pieces, 2), of each sequence as many as its
        tokens need; tokens whose logits are wanted (W,); tokens whose states are wanted, and before which layer (S,)
        twice, from 0.
    cache: keys and values (L, Hk, N, D).
    decoder: weights and biases of the input groups, (L, O, I) and (L, O or 0) of each; norms (L, 2 or 4, H), of query
        and key heads (L, 2, D or 0), the last (1, H); head (V, H); window and rope kind of each layer (L,), window 0:
        none; eps; scaling of queries; whether the activation is gelu.
    stacks: where blocks of at most BLOCKED_PAIRS pairs of one stack begin, and the last ends; stack, token, and weight
        times scale of each pair (J,); the stacks' E, R
        and K (stacks, 3); the addresses of `a_and_gate` and of each b (stacks, L, 4, 4); of the input groups the number
        of projections (4,), and outputs of each projection (4, 3).
    """
    num_tokens, size = tokens[0].shape
    _, num_key_heads, _, head_size = cache[0].shape
    num_qkv, num_queries, num_mlp = decoder[0].shape[1], decoder[2].shape[2], decoder[6].shape[2]
    group_size = num_queries // (num_key_heads * head_size)
    num_pairs, shapes = stacks[1].size, stacks[4]
    max_rank, max_top_k = 1, 1
    for s in range(shapes.shape[0]):
        max_rank, max_top_k = max(max_rank, shapes[s, RANK]), max(max_top_k, shapes[s, TOP_K])
    stored = decoder[0].dtype
    shared = (
        np.empty((num_tokens, num_qkv), np.float32),
        np.empty((num_key_heads, num_tokens * group_size, head_size), stored),
        np.empty((num_tokens, num_queries), stored),
        np.empty((num_tokens, 2 * num_mlp), np.float32),
        np.empty((num_tokens, num_mlp), stored),
        np.empty((num_tokens, size), np.float32),
        np.empty((num_pairs, 3, max_top_k, max_rank), np.float32),
        np.empty((num_pairs, 3, max_top_k), np.int64),
    )
    for thread in prange(threads):
        _decode_part(np.int64(thread), threads, arrivals, tokens, cache, decoder, stacks, shared, logits, states)
