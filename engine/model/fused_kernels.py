"""One step of a whole decoder for a few tokens, each with its own stacks, in one compiled function for CPUs.

Most of a decode step on a CPU is not arithmetic: it is a few thousand small operations. Here they are one call. The
mathematics is that of transformers' Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 layers and of `moe_lora.py`;
activations and sums are float32, weights and cache are as they are stored. Every token is computed by itself, so that
it depends on its own sequence and stacks only, and a token without stacks costs what the base costs.

All compiled code is in this one file: numba keeps it on disk and notices a change of the outermost function's file
only.

Letters: T tokens, Q sequences, W tokens whose logits are wanted, L layers, H hidden size, M MLP size, Hq and Hk query
and key heads, D head size, N cache positions, V vocabulary, J pairs (a token and one of its stacks), E experts, R rank,
K active experts.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered, which is what vectorising them takes. NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}

BLOCKED_TOKENS = 8  # from here on, four rows of weights at a time are faster than one
LANES = 16  # columns are handed out to threads in multiples of this
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
def _two_dots(weights: Any, x0: Any, x1: Any) -> Any:
    """Two tokens times one row of weights, which is read once."""
    s0 = s1 = np.float32(0.0)
    for i in range(x0.size):
        w = widened(weights[i])
        s0 += w * x0[i]
        s1 += w * x1[i]
    return s0, s1


@njit(fastmath=FAST, cache=True)
def _four_dots(w0: Any, w1: Any, w2: Any, w3: Any, x: Any) -> Any:
    """x (I,) times four rows of weights, which share one reading of x."""
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for i in range(x.size):
        v = x[i]
        s0 += widened(w0[i]) * v
        s1 += widened(w1[i]) * v
        s2 += widened(w2[i]) * v
        s3 += widened(w3[i]) * v
    return s0, s1, s2, s3


@njit(fastmath=FAST, cache=True)
def _sixteen_dots(w0: Any, w1: Any, w2: Any, w3: Any, x: Any, out: Any) -> None:
    """out (4, 4) = x (4, I) times four rows of weights: sixteen sums stay in registers, for eight readings."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0.0)
    for i in range(x0.size):
        v0, v1, v2, v3 = widened(w0[i]), widened(w1[i]), widened(w2[i]), widened(w3[i])
        y0, y1, y2, y3 = x0[i], x1[i], x2[i], x3[i]
        a0 += v0 * y0
        a1 += v1 * y0
        a2 += v2 * y0
        a3 += v3 * y0
        b0 += v0 * y1
        b1 += v1 * y1
        b2 += v2 * y1
        b3 += v3 * y1
        c0 += v0 * y2
        c1 += v1 * y2
        c2 += v2 * y2
        c3 += v3 * y2
        d0 += v0 * y3
        d1 += v1 * y3
        d2 += v2 * y3
        d3 += v3 * y3
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = a0, a1, a2, a3
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = b0, b1, b2, b3
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = c0, c1, c2, c3
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = d0, d1, d2, d3


@njit(fastmath=FAST, cache=True)
def _product(weights: Any, first: int, last: int, x: Any, out: Any) -> None:
    """out[:, first:last] = x times rows `first` to `last` of the weights (O, I); x (T, I)."""
    tokens = x.shape[0]
    column = first
    if tokens >= BLOCKED_TOKENS:
        while column + 4 <= last:
            w0, w1, w2, w3 = weights[column], weights[column + 1], weights[column + 2], weights[column + 3]
            t = 0
            while t + 4 <= tokens:
                _sixteen_dots(w0, w1, w2, w3, x[t : t + 4], out[t : t + 4, column : column + 4])
                t += 4
            while t < tokens:
                o = out[t]
                o[column], o[column + 1], o[column + 2], o[column + 3] = _four_dots(w0, w1, w2, w3, x[t])
                t += 1
            column += 4
    while column < last:  # one row of weights after the other, as they lie in memory
        row = weights[column]
        t = 0
        while t + 2 <= tokens:
            out[t, column], out[t + 1, column] = _two_dots(row, x[t], x[t + 1])
            t += 2
        if t < tokens:
            out[t, column] = _dot(row, x[t])
        column += 1


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


@njit(fastmath=FAST, cache=True)
def _expert_products(
    x: Any,
    pair: int,
    layer: int,
    group: int,
    member: int,
    places: Any,
    stacks: Any,
    like: Any,
    scratch: Any,
    shared: Any,
) -> None:
    """The gate of one projection and the A products of some of its chosen experts, times gate and scale.

    x (I,). `places` are the first and the last (exclusive) of the chosen experts, the likeliest first; of experts with
    the same logit the first is the likelier one. Writes the experts, and their products (R,) each.
    """
    _, pair_stack, _, pair_weight, shapes, addresses, _, _ = stacks
    mid, chosen = shared[MID], shared[CHOSEN]
    logits, likeliest = scratch
    stack = pair_stack[pair]
    experts, rank, top_k, size = shapes[stack, EXPERTS], shapes[stack, RANK], shapes[stack, TOP_K], x.size
    rows = experts * rank + experts
    address = addresses[stack, layer, group, 0] + member * rows * size * like.itemsize
    weights = memory_at(address, rows * size, like)
    for e in range(experts):
        at = (experts * rank + e) * size
        logits[e] = _dot(weights[at : at + size], x)
    for k in range(top_k):
        best = -1
        for e in range(experts):
            is_taken = False
            for before in range(k):
                is_taken |= likeliest[before] == e
            if not is_taken and (best < 0 or logits[e] > logits[best]):
                best = e
        likeliest[k] = best
    total = np.float32(0.0)
    for k in range(top_k):
        total += np.exp(logits[likeliest[k]] - logits[likeliest[0]])
    for place in range(places[0], min(places[1], top_k)):
        expert = likeliest[place]
        factor = pair_weight[pair] * np.exp(logits[expert] - logits[likeliest[0]]) / total
        products = mid[pair, member, place]
        at = expert * rank * size
        r = 0
        while r + 4 <= rank:
            m0, m1, m2, m3 = _four_dots(
                weights[at : at + size],
                weights[at + size : at + 2 * size],
                weights[at + 2 * size : at + 3 * size],
                weights[at + 3 * size : at + 4 * size],
                x,
            )
            products[r], products[r + 1] = factor * m0, factor * m1
            products[r + 2], products[r + 3] = factor * m2, factor * m3
            r += 4
            at += 4 * size
        while r < rank:
            products[r] = factor * _dot(weights[at : at + size], x)
            r += 1
            at += size
        chosen[pair, member, place] = expert


@njit(fastmath=FAST, cache=True)
def _choose_experts(
    thread: int, threads: int, layer: int, group: int, x: Any, stacks: Any, like: Any, scratch: Any, shared: Any
) -> None:
    """A thread's part of the gates and A products of one input group, x (T, I)."""
    _, pair_stack, pair_token, _, _, _, members, _ = stacks
    max_top_k, num_members = shared[MID].shape[2], members[group]
    num_items = pair_stack.size * num_members
    # A gate is computed once for all chosen experts, unless there are too few of them to go round.
    parts = max_top_k if num_items < 2 * threads else 1
    for item in range(thread, num_items * parts, threads):
        pair, member, part = item // (num_members * parts), item // parts % num_members, item % parts
        places = (part, part + 1) if parts > 1 else (0, max_top_k)
        _expert_products(x[pair_token[pair]], pair, layer, group, member, places, stacks, like, scratch, shared)


@njit(fastmath=FAST, cache=True)
def _add_deltas(
    out: Any, at: int, first: int, last: int, layer: int, group: int, member: int, stacks: Any, like: Any, shared: Any
) -> None:
    """out (T, O) += mid B for the columns `first` to `last` of one projection, which begins at column `at`.

    Only the chosen experts' rows of B are read.
    """
    pair_start, pair_stack, _, _, shapes, addresses, _, member_outputs = stacks
    mid, chosen = shared[MID], shared[CHOSEN]
    width, columns = member_outputs[group, member], last - first
    for t in range(out.shape[0]):
        row = out[t, at + first : at + last]
        for pair in range(pair_start[t], pair_start[t + 1]):
            stack = pair_stack[pair]
            experts, rank, top_k = shapes[stack, EXPERTS], shapes[stack, RANK], shapes[stack, TOP_K]
            weights = memory_at(addresses[stack, layer, group, 1 + member], experts * rank * width, like)
            for k in range(top_k):
                factors = mid[pair, member, k]
                begin = chosen[pair, member, k] * rank * width + first
                r = 0
                while r + 4 <= rank:  # four rows at a time, so that the sums are read and written less often
                    b0 = weights[begin : begin + columns]
                    b1 = weights[begin + width : begin + width + columns]
                    b2 = weights[begin + 2 * width : begin + 2 * width + columns]
                    b3 = weights[begin + 3 * width : begin + 3 * width + columns]
                    f0, f1, f2, f3 = factors[r], factors[r + 1], factors[r + 2], factors[r + 3]
                    for i in range(columns):
                        low = f0 * widened(b0[i]) + f1 * widened(b1[i])
                        row[i] += low + (f2 * widened(b2[i]) + f3 * widened(b3[i]))
                    r += 4
                    begin += 4 * width
                while r < rank:
                    b = weights[begin : begin + columns]
                    f = factors[r]
                    for i in range(columns):
                        row[i] += f * widened(b[i])
                    r += 1
                    begin += width


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
    shared: Any,
) -> None:
    """A thread's columns of every projection of one input group: out (T, O) = x W + bias + the stacks' deltas."""
    _, pair_stack, _, _, _, _, members, member_outputs = stacks
    at = 0
    for member in range(members[group]):
        first, last = _share(thread, threads, member_outputs[group, member])
        _product(weights[layer], at + first, at + last, x, out)
        if bias.shape[1]:
            for t in range(out.shape[0]):
                for column in range(at + first, at + last):
                    out[t, column] += bias[layer, column]
        if pair_stack.size and first < last:
            _add_deltas(out, at, first, last, layer, group, member, stacks, weights, shared)
        at += member_outputs[group, member]


@njit(fastmath=FAST, cache=True)
def _add_branch(hidden: Any, added: Any, norms: Any, place: int, eps: float, normed: Any) -> None:
    """hidden (T, H) += what attention or MLP made of it; where a layer has four norms, through norm `place`."""
    branch = added
    if norms.shape[0] == 4:
        _normed(added, norms[place], eps, normed)
        branch = normed
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
) -> None:
    """What one of the threads does in a step. All of them walk through the same phases and wait for each other."""
    embedded, cos, sin, pasts, first_tokens, starts, wanted = tokens
    keys, values = cache
    qkv_weight, qkv_bias, o_weight, o_bias, gate_up_weight, gate_up_bias, down_weight, down_bias = decoder[:8]
    norms, head_norms, final_norm, head_weight, windows, rope_kinds, eps, scaling, is_gelu = decoder[8:]
    qkv, scores, attended, gate_up, activated, added, _, _ = shared
    counter = arrivals.ctypes.data
    rows, size = embedded.shape
    num_layers, num_key_heads, _, _ = keys.shape
    num_mlp, group_size = activated.shape[1], scores.shape[2]
    has_stacks = stacks[1].size > 0
    before_mlp = norms.shape[1] // 2  # the norms: before attention, [behind it,] before the MLP[, behind it]
    hidden = embedded.copy()  # every thread has its own: to add is cheaper than to wait
    normed = np.empty_like(hidden)
    shapes = stacks[4]
    max_experts, max_top_k = 1, 1
    for stack in range(shapes.shape[0]):
        max_experts, max_top_k = max(max_experts, shapes[stack, EXPERTS]), max(max_top_k, shapes[stack, TOP_K])
    scratch = (np.empty(max_experts, np.float32), np.empty(max_top_k, np.int64))
    passed = 0
    for layer in range(num_layers):
        _normed(hidden, norms[layer, 0], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 0, normed, stacks, qkv_weight, scratch, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, qkv_weight, qkv_bias, layer, 0, normed, qkv, stacks, shared)
        passed = _wait_for_all(counter, threads, passed)
        kind = rope_kinds[layer]
        for item in range(thread, (first_tokens.size - 1) * num_key_heads, threads):
            sequence, head = item // num_key_heads, item % num_key_heads
            for t in range(first_tokens[sequence], first_tokens[sequence + 1]):  # in order: each reads those before
                _attended(
                    head, group_size, qkv[t], head_norms[layer], cos[kind, t], sin[kind, t], keys[layer, head],
                    values[layer, head], starts[sequence], pasts[t], windows[layer], eps, scaling,
                    scores[sequence, head], attended[t],
                )  # fmt: skip
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 1, attended, stacks, qkv_weight, scratch, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, o_weight, o_bias, layer, 1, attended, added, stacks, shared)
        passed = _wait_for_all(counter, threads, passed)
        _add_branch(hidden, added, norms[layer], 1, eps, normed)
        _normed(hidden, norms[layer, before_mlp], eps, normed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 2, normed, stacks, qkv_weight, scratch, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, gate_up_weight, gate_up_bias, layer, 2, normed, gate_up, stacks, shared)
        first, last = _share(thread, threads, num_mlp)  # the same columns of gate and of up are this thread's
        for t in range(rows):
            for column in range(first, last):
                activated[t, column] = _activated(gate_up[t, column], is_gelu) * gate_up[t, num_mlp + column]
        passed = _wait_for_all(counter, threads, passed)
        if has_stacks:
            _choose_experts(thread, threads, layer, 3, activated, stacks, qkv_weight, scratch, shared)
            passed = _wait_for_all(counter, threads, passed)
        _project(thread, threads, down_weight, down_bias, layer, 3, activated, added, stacks, shared)
        passed = _wait_for_all(counter, threads, passed)
        _add_branch(hidden, added, norms[layer], 3, eps, normed)
    last_hidden = np.empty((wanted.size, size), np.float32)
    for w in range(wanted.size):
        last_hidden[w] = hidden[wanted[w]]
    _normed(last_hidden, final_norm[0], eps, last_hidden)
    first, last = _share(thread, threads, head_weight.shape[0])
    _product(head_weight, first, last, last_hidden, logits)


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
    """Writes the keys and values of T tokens into the cache, and logits that follow some of them into `logits` (W, V).

    arrivals: (1,), 0.
    tokens: embedded (T, H); cosines and sines (rope kinds, T, D); how many tokens of its sequence precede each (T,);
        where each sequence's tokens begin (Q + 1,) and its first position in the cache (Q,); the wanted tokens (W,).
    cache: keys and values (L, Hk, N, D).
    decoder: weights and biases of the input groups, (L, O, I) and (L, O or 0) of each; norms (L, 2 or 4, H), of query
        and key heads (L, 2, D or 0), the last (1, H); head (V, H); window and rope kind of each layer (L,), window 0:
        none; eps; scaling of queries; whether the activation is gelu.
    stacks: where a token's pairs begin (T + 1,); stack, token, and weight times scale of each (J,); the stacks' E, R
        and K (stacks, 3); the addresses of `a_and_gate` and of each b (stacks, L, 4, 4); of the input groups the number
        of projections (4,), and outputs of each projection (4, 3).
    """
    embedded, _, _, pasts, first_tokens, _, _ = tokens
    num_tokens, size = embedded.shape
    num_key_heads, head_size = cache[0].shape[1], cache[0].shape[3]
    num_sequences, group_size = first_tokens.size - 1, decoder[2].shape[2] // (num_key_heads * head_size)
    num_qkv, num_queries, num_mlp = decoder[0].shape[1], decoder[2].shape[2], decoder[6].shape[2]
    num_pairs, shapes = stacks[1].size, stacks[4]
    max_rank, max_top_k, longest = 1, 1, 0
    for s in range(shapes.shape[0]):
        max_rank, max_top_k = max(max_rank, shapes[s, RANK]), max(max_top_k, shapes[s, TOP_K])
    for t in range(num_tokens):
        longest = max(longest, pasts[t] + 1)
    shared = (
        np.empty((num_tokens, num_qkv), np.float32),
        np.empty((num_sequences, num_key_heads, group_size, longest), np.float32),
        np.empty((num_tokens, num_queries), np.float32),
        np.empty((num_tokens, 2 * num_mlp), np.float32),
        np.empty((num_tokens, num_mlp), np.float32),
        np.empty((num_tokens, size), np.float32),
        np.empty((num_pairs, 3, max_top_k, max_rank), np.float32),
        np.empty((num_pairs, 3, max_top_k), np.int64),
    )
    for thread in prange(threads):
        _decode_part(np.int64(thread), threads, arrivals, tokens, cache, decoder, stacks, shared, logits)
