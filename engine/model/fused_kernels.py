"""One decode step of a whole decoder, with the stacks of every row, in one compiled function for CPUs.

Most of a decode step on a CPU is not arithmetic: it is a few thousand small operations. Here they are one call. The
mathematics is that of transformers' Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 layers and of `moe_lora.py`;
activations and sums are float32, weights and cache are as they are stored. Every row is computed by itself, so that it
depends on its own tokens and stacks only, and a row without stacks costs what the base costs.

All compiled code is in this one file: numba keeps it on disk and notices a change of the outermost function's file
only.

Letters: T rows (one token each), L layers, H hidden size, M MLP size, Hq and Hk query and key heads, D head size,
N cache positions, V vocabulary, J pairs (a row and one of its stacks), E experts, R rank, K active experts.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered, which is what vectorising them takes. NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}

ROWS_AT_ONCE = 8  # rows that share one reading of a weight
LANES = 16  # columns are handed out to threads in multiples of this
SPINS = 10_000  # of a thread that waits for another, before it lets others have its core
MEETING_YIELDS = 1_000_000  # about a second

# Columns of `stack_shapes`.
ADDRESS, EXPERTS, RANK, TOP_K = range(4)


def widened(value: Any) -> Any:  # pragma: no cover - compiled
    """A stored number as float32: bfloat16 travels as uint16."""
    raise NotImplementedError


@overload(widened, inline="always")
def _widened(value: Any) -> Any:
    def same(value: Any) -> Any:
        return value

    def from_bfloat16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    return same if isinstance(value, types.Float) else from_bfloat16


def narrowed(value: Any, like: Any) -> Any:  # pragma: no cover - compiled
    """A float32 as the array `like` stores it; bfloat16 rounds to nearest, ties to even."""
    raise NotImplementedError


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


def memory_at(address: Any, size: Any, like: Any) -> Any:  # pragma: no cover - compiled
    """`size` numbers from an address on, of the type that `like` has."""
    raise NotImplementedError


@overload(memory_at)
def _memory_at(address: Any, size: Any, like: Any) -> Any:
    dtype = np.float32 if isinstance(like.dtype, types.Float) else np.uint16

    def at(address: Any, size: Any, like: Any) -> Any:
        return carray(_pointer(address), size, dtype)

    return at


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


@njit(fastmath=FAST, cache=True, inline="always")
def _dot(weights: Any, x: Any) -> Any:
    total = np.float32(0.0)
    for i in range(x.size):
        total += widened(weights[i]) * x[i]
    return total


@njit(fastmath=FAST, cache=True)
def _product(weights: Any, x: Any, column: int, out: Any) -> None:
    """out[:, column] = x weights: (I,), (T, I) -> (T,). A weight is read once for eight rows."""
    rows, size = x.shape
    t = 0
    while t + ROWS_AT_ONCE <= rows:
        x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
        x4, x5, x6, x7 = x[t + 4], x[t + 5], x[t + 6], x[t + 7]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0.0)
        for i in range(size):
            w = widened(weights[i])
            s0 += w * x0[i]
            s1 += w * x1[i]
            s2 += w * x2[i]
            s3 += w * x3[i]
            s4 += w * x4[i]
            s5 += w * x5[i]
            s6 += w * x6[i]
            s7 += w * x7[i]
        out[t, column], out[t + 1, column], out[t + 2, column], out[t + 3, column] = s0, s1, s2, s3
        out[t + 4, column], out[t + 5, column], out[t + 6, column], out[t + 7, column] = s4, s5, s6, s7
        t += ROWS_AT_ONCE
    while t + 2 <= rows:
        x0, x1 = x[t], x[t + 1]
        s0 = s1 = np.float32(0.0)
        for i in range(size):
            w = widened(weights[i])
            s0 += w * x0[i]
            s1 += w * x1[i]
        out[t, column], out[t + 1, column] = s0, s1
        t += 2
    while t < rows:
        out[t, column] = _dot(weights, x[t])
        t += 1


@njit(fastmath=FAST, cache=True)
def _normed(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Root mean square norm of every row (Zhang and Sennrich 2019)."""
    rows, size = x.shape
    for t in range(rows):
        squares = np.float32(0.0)
        for i in range(size):
            squares += x[t, i] * x[t, i]
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[t, i] = x[t, i] * factor * weight[i]


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


@njit(fastmath=FAST, cache=True)
def _activated(x: float, is_gelu: bool) -> float:
    if is_gelu:  # the tanh form
        inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))
    return x / (np.float32(1.0) + np.exp(-x))


@njit(fastmath=FAST, cache=True)
def _attended(
    head: int,
    group: int,
    qkv: Any,
    norms: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    start: int,
    past: int,
    window: int,
    eps: float,
    scaling: float,
    scores: Any,
    out: Any,
) -> None:
    """One row and one key head: writes its key and value into the cache and attends with the head's queries.

    qkv (Hq D + 2 Hk D,), norms (2, D or 0), cos and sin (D,), keys and values (N, D), scores (G, longest), out (Hq D,).
    """
    size = keys.shape[1]
    num_queries = out.size
    num_keys = (qkv.size - num_queries) // 2
    key = qkv[num_queries + head * size : num_queries + (head + 1) * size]
    _normed_head(key, norms[1], eps)
    _rotated(key, cos, sin)
    value_at = num_queries + num_keys + head * size
    for i in range(size):
        keys[start + past, i] = narrowed(key[i], keys)
        values[start + past, i] = narrowed(qkv[value_at + i], values)
    first = 0 if window == 0 else max(0, past + 1 - window)
    for g in range(group):
        query = qkv[(head * group + g) * size : (head * group + g + 1) * size]
        _normed_head(query, norms[0], eps)
        _rotated(query, cos, sin)
        for i in range(size):
            query[i] *= np.float32(scaling)
        largest = np.float32(-np.inf)
        for m in range(first, past + 1):
            score = _dot(keys[start + m], query)
            scores[g, m] = score
            largest = max(largest, score)
        total = np.float32(0.0)
        for m in range(first, past + 1):
            share = np.exp(scores[g, m] - largest)
            scores[g, m] = share
            total += share
        output = out[(head * group + g) * size : (head * group + g + 1) * size]
        for i in range(size):
            output[i] = np.float32(0.0)
        for m in range(first, past + 1):
            share = scores[g, m] / total
            value = values[start + m]
            for i in range(size):
                output[i] += share * widened(value[i])


@njit(cache=True)
def _group_offset(shape: Any, layer: int, group: int, stacks: Any) -> int:
    """Where a group begins in a stack's memory, in numbers: the order in which `serving_stack` lays them out."""
    _, _, _, _, _, inputs, outputs, members, _ = stacks
    experts, rank = shape[EXPERTS], shape[RANK]
    per_layer = 0
    before = 0
    for g in range(inputs.size):
        if g == group:
            before = per_layer
        per_layer += members[g] * (experts * rank + experts) * inputs[g] + experts * rank * outputs[g]
    return layer * per_layer + before


@njit(fastmath=FAST, cache=True)
def _expert_rows(
    x: Any, pair: int, layer: int, group: int, member: int, place: int, stacks: Any, like: Any, mid: Any
) -> int:
    """A's rows of the `place`-th likeliest expert of one projection, times gate and scale: x (I,) -> mid (R,).

    Returns the expert. Of experts with the same logit the first is the likelier one.
    """
    _, pair_stack, _, pair_weight, shapes, inputs, _, members, _ = stacks
    shape = shapes[pair_stack[pair]]
    experts, rank, top_k, size = shape[EXPERTS], shape[RANK], shape[TOP_K], inputs[group]
    rows = experts * rank + experts
    offset = _group_offset(shape, layer, group, stacks)
    weights = memory_at(shape[ADDRESS], offset + members[group] * rows * size, like)[offset:]
    first = member * rows
    logits = np.empty(experts, np.float32)
    for e in range(experts):
        row = (first + experts * rank + e) * size
        logits[e] = _dot(weights[row : row + size], x)
    likeliest = np.empty(top_k, np.int64)
    taken = np.zeros(experts, np.bool_)
    for k in range(top_k):
        best = -1
        for e in range(experts):
            if not taken[e] and (best < 0 or logits[e] > logits[best]):
                best = e
        likeliest[k] = best
        taken[best] = True
    total = np.float32(0.0)
    for k in range(top_k):
        total += np.exp(logits[likeliest[k]] - logits[likeliest[0]])
    expert = likeliest[place]
    factor = pair_weight[pair] * np.exp(logits[expert] - logits[likeliest[0]]) / total
    for r in range(rank):
        row = (first + expert * rank + r) * size
        mid[r] = factor * _dot(weights[row : row + size], x)
    return expert


@njit(fastmath=FAST, cache=True)
def _choose_experts(
    thread: int, threads: int, layer: int, group: int, x: Any, stacks: Any, like: Any, mid: Any, chosen: Any
) -> None:
    """A thread's part of the gates and A products of one input group: every pair's chosen experts."""
    _, pair_stack, pair_row, _, shapes, _, _, members, _ = stacks
    max_top_k, num_members = mid.shape[2], members[group]
    for item in range(thread, pair_stack.size * num_members * max_top_k, threads):
        j, member, place = item // (num_members * max_top_k), item // max_top_k % num_members, item % max_top_k
        if place < shapes[pair_stack[j], TOP_K]:
            chosen[j, member, place] = _expert_rows(
                x[pair_row[j]], j, layer, group, member, place, stacks, like, mid[j, member, place]
            )


@njit(fastmath=FAST, cache=True)
def _add_deltas(
    out: Any, first: int, layer: int, group: int, member: int, stacks: Any, like: Any, mid: Any, chosen: Any
) -> None:
    """out (T, C) += mid B: C columns of one projection from `first` on, over the chosen experts' rows only."""
    pair_start, pair_stack, _, _, shapes, inputs, _, members, member_outputs = stacks
    rows, columns = out.shape
    width = member_outputs[group, member]
    for t in range(rows):
        row = out[t]
        for j in range(pair_start[t], pair_start[t + 1]):
            shape = shapes[pair_stack[j]]
            experts, rank, top_k = shape[EXPERTS], shape[RANK], shape[TOP_K]
            offset = _group_offset(shape, layer, group, stacks)
            offset += members[group] * (experts * rank + experts) * inputs[group]
            for before in range(member):
                offset += experts * rank * member_outputs[group, before]
            weights = memory_at(shape[ADDRESS], offset + experts * rank * width, like)[offset:]
            for k in range(top_k):
                for r in range(rank):
                    factor = mid[j, member, k, r]
                    at = (chosen[j, member, k] * rank + r) * width + first
                    b = weights[at : at + columns]
                    for i in range(columns):
                        row[i] += factor * widened(b[i])


@njit(cache=True)
def _share(part: int, parts: int, size: int) -> tuple[int, int]:
    """The part-th of `parts` ranges that cover `size` columns, each a multiple of LANES long but for the last."""
    blocks = (size + LANES - 1) // LANES
    return min(blocks * part // parts * LANES, size), min(blocks * (part + 1) // parts * LANES, size)


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
    mid: Any,
    chosen: Any,
) -> None:
    """A thread's columns of every projection of one input group: out (T, O) = x W + bias + the stacks' deltas."""
    _, pair_stack, _, _, _, _, _, members, member_outputs = stacks
    at = 0
    for member in range(members[group]):
        first, last = _share(thread, threads, member_outputs[group, member])
        for column in range(at + first, at + last):
            _product(weights[layer, column], x, column, out)
        if bias.shape[1]:
            for t in range(out.shape[0]):
                for column in range(at + first, at + last):
                    out[t, column] += bias[layer, column]
        if pair_stack.size and first < last:
            columns = out[:, at + first : at + last]
            _add_deltas(columns, first, layer, group, member, stacks, weights, mid, chosen)
        at += member_outputs[group, member]


@njit(fastmath=FAST, cache=True)
def _add_rows(out: Any, added: Any) -> None:
    rows, size = out.shape
    for t in range(rows):
        for i in range(size):
            out[t, i] += added[t, i]


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
) -> None:
    """What one of the threads does in a step. All of them walk through the same phases and wait for each other."""
    embedded, cos, sin, starts, pasts = tokens
    keys, values = cache
    qkv_weight, qkv_bias, o_weight, o_bias, gate_up_weight, gate_up_bias, down_weight, down_bias = decoder[:8]
    norms, head_norms, final_norm, head_weight, windows, rope_kinds, eps, scaling, is_gelu = decoder[8:]
    qkv, scores, attended, gate_up, activated, added, mid, chosen = shared
    counter = arrivals.ctypes.data
    rows, _ = embedded.shape
    num_layers, num_key_heads, _, _ = keys.shape
    num_mlp, group_size = activated.shape[1], scores.shape[2]
    has_stacks = stacks[1].size > 0
    sandwich = norms.shape[1] == 4
    hidden = embedded.copy()  # every thread has its own: to add is cheaper than to wait
    normed = np.empty_like(hidden)
    passed = 0
    for layer in range(num_layers):
        _normed(hidden, norms[layer, 0], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 0, normed, stacks, qkv_weight, mid, chosen)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, qkv_weight, qkv_bias, layer, 0, normed, qkv, stacks, mid, chosen)
        passed = _wait_for_all(counter, threads, passed)
        for item in range(thread, rows * num_key_heads, threads):
            t, head = item // num_key_heads, item % num_key_heads
            kind = rope_kinds[layer]
            _attended(
                head, group_size, qkv[t], head_norms[layer], cos[kind, t], sin[kind, t], keys[layer, head],
                values[layer, head], starts[t], pasts[t], windows[layer], eps, scaling, scores[t, head], attended[t],
            )  # fmt: skip
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 1, attended, stacks, qkv_weight, mid, chosen)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, o_weight, o_bias, layer, 1, attended, added, stacks, mid, chosen)
        passed = _wait_for_all(counter, threads, passed)
        if sandwich:
            _normed(added, norms[layer, 1], eps, normed)
            _add_rows(hidden, normed)
        else:
            _add_rows(hidden, added)
        _normed(hidden, norms[layer, 2 if sandwich else 1], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 2, normed, stacks, qkv_weight, mid, chosen)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, gate_up_weight, gate_up_bias, layer, 2, normed, gate_up, stacks, mid, chosen)
        first, last = _share(thread, threads, num_mlp)  # the same columns of gate and of up are this thread's
        for t in range(rows):
            for column in range(first, last):
                activated[t, column] = _activated(gate_up[t, column], is_gelu) * gate_up[t, num_mlp + column]
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 3, activated, stacks, qkv_weight, mid, chosen)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, down_weight, down_bias, layer, 3, activated, added, stacks, mid, chosen)
        passed = _wait_for_all(counter, threads, passed)
        if sandwich:
            _normed(added, norms[layer, 3], eps, normed)
            _add_rows(hidden, normed)
        else:
            _add_rows(hidden, added)
    _normed(hidden, final_norm[0], eps, normed)
    first, last = _share(thread, threads, head_weight.shape[0])
    for column in range(first, last):
        _product(head_weight[column], normed, column, logits)


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
def decode(threads: int, arrivals: Any, tokens: Any, cache: Any, decoder: Any, stacks: Any, logits: Any) -> None:
    """Writes the keys and values of T tokens into the cache and the logits that follow them into `logits` (T, V).

    arrivals: (1,), 0.
    tokens: embedded (T, H), cosines and sines (rope kinds, T, D), first position of a row's span in the cache (T,),
        tokens of the row that are in the cache (T,).
    cache: keys and values (L, Hk, N, D).
    decoder: weights and biases of the input groups, (L, O, I) and (L, O or 0) of each; norms (L, 2 or 4, H), of query
        and key heads (L, 2, D or 0), the last (1, H); head (V, H); window and rope kind of each layer (L,), window 0:
        none; eps; scaling of queries; whether the activation is gelu.
    stacks: where a row's pairs begin (T + 1,); stack, row, and weight times scale of each (J,); addresses and shapes of
        the stacks (stacks, 4); of the input groups inputs, outputs, number of projections (4,), and outputs of each
        projection (4, 3).
    """
    embedded, _, _, _, pasts = tokens
    rows, size = embedded.shape
    num_key_heads, head_size = cache[0].shape[1], cache[0].shape[3]
    num_qkv, num_queries, num_mlp = decoder[0].shape[1], decoder[2].shape[2], decoder[6].shape[2]
    num_pairs, shapes = stacks[1].size, stacks[4]
    max_rank, max_top_k, longest = 1, 1, 0
    for s in range(shapes.shape[0]):
        max_rank, max_top_k = max(max_rank, shapes[s, RANK]), max(max_top_k, shapes[s, TOP_K])
    for t in range(rows):
        longest = max(longest, pasts[t] + 1)
    shared = (
        np.empty((rows, num_qkv), np.float32),
        np.empty((rows, num_key_heads, num_queries // (num_key_heads * head_size), longest), np.float32),
        np.empty((rows, num_queries), np.float32),
        np.empty((rows, 2 * num_mlp), np.float32),
        np.empty((rows, num_mlp), np.float32),
        np.empty((rows, size), np.float32),
        np.empty((num_pairs, 3, max_top_k, max_rank), np.float32),
        np.empty((num_pairs, 3, max_top_k), np.int64),
    )
    for thread in prange(threads):
        _decode_part(np.int64(thread), threads, arrivals, tokens, cache, decoder, stacks, shared, logits)
