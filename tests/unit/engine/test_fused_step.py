"""The fused step against transformers' own forward with slowly added stacks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from engine.block_table import BLOCK_TOKENS, BlockTable
from engine.model.base import Base, load_base
from engine.model.fused_kernels import memory_at, narrowed, widened
from engine.model.fused_step import FusedRow, FusedStep, make_fused_step
from engine.model.moe_lora import MoeLoraConfig, ServingStack
from stack_store.format import ProjectionTensors
from tests.reference import ReferenceModel
from tests.stacks import Projections, random_projections, to_serving
from tests.tiny_bases import make_llama

CONFIGS = [MoeLoraConfig(4, 4, 2, 4.0), MoeLoraConfig(2, 8, 1, 2.0), MoeLoraConfig(3, 2, 3, 4.0)]
SPAN = 2 * BLOCK_TOKENS
Folder = Callable[[str], Path]


def load(folder: Path, dtype: Any = "float32") -> Base:
    return load_base(str(folder), base_format="dense", dtype=dtype)


def step_of(base: Base, rows: int, *, threads: int = 1) -> FusedStep:
    """A fused step whose cache has two blocks for each of the rows."""
    config = base.text_config
    shape = (base.num_layers, config.num_key_value_heads, rows * SPAN, config.head_dim)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = make_fused_step(base, torch.zeros(shape, dtype=base.dtype), torch.zeros(shape, dtype=base.dtype))
    finally:
        torch.set_num_threads(before)
    assert step is not None
    return step


def tables_of(rows: int) -> list[BlockTable]:
    """Two blocks of each row, of which those of every second row do not lie behind each other."""
    tables = [BlockTable.of([2 * row, 2 * row + 1]) for row in range(rows)]
    for row in range(1, rows, 2):
        tables[row] = BlockTable.of(reversed(tables[row].blocks))
    return tables


def decoded(
    step: FusedStep, texts: list[list[int]], mixes: list[dict[ServingStack, float]], *, chunk: int = 1
) -> list[Tensor]:
    """The logits behind every chunk of every row: (chunks, V) each. The rows run side by side while they last."""
    tables = tables_of(len(texts))
    logits: list[list[Tensor]] = [[] for _ in texts]
    for past in range(0, max(map(len, texts)), chunk):
        numbers = [number for number, text in enumerate(texts) if past < len(text)]
        rows = [FusedRow(texts[n][past : past + chunk], tables[n], past, mixes[n], True) for n in numbers]
        for number, values in zip(numbers, step.run(rows).logits, strict=True):
            logits[number].append(values)
    return [torch.stack(values) for values in logits]


def drawn_projections(base: Base, number: int) -> Projections:
    return random_projections(base.geometry, CONFIGS[number], seed=number)


def drawn_stack(base: Base, number: int) -> ServingStack:
    """In memory of its own each time."""
    projections = drawn_projections(base, number)
    return to_serving(base.geometry, CONFIGS[number], projections, dtype=base.dtype, round=number + 1, panelled=True)


def drawn_stacks(base: Base) -> tuple[list[ServingStack], list[tuple[MoeLoraConfig, Projections]]]:
    numbers = range(len(CONFIGS))
    return [drawn_stack(base, n) for n in numbers], [(CONFIGS[n], drawn_projections(base, n)) for n in numbers]


TEXTS = [
    [5, 9, 200, 31, 7, 90, 11, 12, 13, 14, 15, 16, *range(20, 32)],
    [80, 81, 82],
    [3],
    [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, *range(60, 80)],
]
MIXES: list[dict[int, float]] = [{0: 1.0}, {}, {1: 0.7, 2: 0.3}, {0: 0.2, 1: 0.9, 2: 1.0}]


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "qwen3", "mistral"])
def test_every_row_has_the_logits_of_the_plain_forward(
    architecture: str, threads: int, chunk: int, tiny_base_folder: Folder
) -> None:
    base = load(tiny_base_folder(architecture))
    reference = ReferenceModel(tiny_base_folder(architecture))
    stacks, drawn = drawn_stacks(base)
    # More rows than share one reading of a weight.
    texts, mixes = TEXTS * 3, MIXES * 3
    got = decoded(
        step_of(base, len(texts), threads=threads),
        texts,
        [{stacks[i]: w for i, w in mix.items()} for mix in mixes],
        chunk=chunk,
    )
    for text, mix, logits in zip(texts, mixes, got, strict=True):
        expected = reference.logits(text, [(*drawn[i], weight) for i, weight in mix.items()])
        ends = [min(past + chunk, len(text)) - 1 for past in range(0, len(text), chunk)]
        torch.testing.assert_close(logits, expected[ends], atol=2e-4, rtol=1e-4)


def test_widths_that_fill_no_panel(tmp_path: Path) -> None:
    """40 queries, 20 keys, 104 activations; the columns of the last panel are fewer, and some threads have no other."""
    folder = make_llama(tmp_path / "odd", hidden_size=72, intermediate_size=104, head_dim=10)
    base, reference = load(folder), ReferenceModel(folder)
    stacks, drawn = drawn_stacks(base)
    mixes = [{stacks[i]: w for i, w in mix.items()} for mix in MIXES]
    for text, mix, logits in zip(TEXTS, MIXES, decoded(step_of(base, 4, threads=2), TEXTS, mixes), strict=True):
        expected = reference.logits(text, [(*drawn[i], weight) for i, weight in mix.items()])
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_stack_that_is_not_panelled_is_refused(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    stack = to_serving(base.geometry, CONFIGS[0], drawn_projections(base, 0), domain="law", round=2)
    with pytest.raises(ValueError, match="'law', round 2, is not panelled"):
        decoded(step_of(base, 1), [TEXTS[1]], [{stack: 1.0}])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_are_the_same_bits_in_any_company_chunks_and_memory(
    architecture: str, dtype: str, tiny_base_folder: Folder
) -> None:
    base = load(tiny_base_folder(architecture), dtype)
    stacks, _ = drawn_stacks(base)
    elsewhere = [drawn_stack(base, number) for number in reversed(range(len(stacks)))][::-1]
    mixes, same_mixes = ([{of[i]: weight for i, weight in mix.items()} for mix in MIXES] for of in (stacks, elsewhere))
    together = decoded(step_of(base, 4, threads=2), TEXTS, mixes)
    for text, mix, expected in zip(TEXTS, same_mixes, together, strict=True):
        [alone] = decoded(step_of(base, 1), [text], [mix])
        assert torch.equal(alone, expected)
        [in_chunks] = decoded(step_of(base, 1), [text], [mix], chunk=5)
        assert torch.equal(in_chunks, expected[[min(past + 5, len(text)) - 1 for past in range(0, len(text), 5)]])


def test_only_wanted_logits_are_computed(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    step = step_of(base, 2)
    first, second = tables_of(2)
    unwanted = FusedRow(TEXTS[0][:4], first, 0, {}, False)
    [logits] = step.run([unwanted, FusedRow(TEXTS[1], second, 0, {}, True)]).logits
    [alone] = step_of(base, 1).run([FusedRow(TEXTS[1], first, 0, {}, True)]).logits
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0.0)
    assert step.run([replace(unwanted, past=4)]).logits.shape == (0, base.text_config.vocab_size)


def test_a_large_score_and_a_small_one_share_a_softmax(tiny_base_folder: Folder) -> None:
    """Scores far apart overflow where the largest is not subtracted."""
    folder = tiny_base_folder("llama")
    reference = ReferenceModel(folder)
    base = load(folder)
    for model in (base.model, reference.base.model):
        for layer in model.get_decoder().layers:  # type: ignore[operator]
            layer.self_attn.q_proj.weight.data *= 300
    [got] = decoded(step_of(base, 1), [TEXTS[0]], [{}])
    torch.testing.assert_close(got, reference.logits(TEXTS[0], []), atol=2e-3, rtol=1e-3)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_bfloat16_is_closer_to_float32_than_the_modules(tiny_base_folder: Folder) -> None:
    folder = tiny_base_folder("gemma3")
    half, full = load(folder, "bfloat16"), load(folder)
    for target, source in zip(full.model.parameters(), half.model.parameters(), strict=True):
        target.data.copy_(source.data)
    got = decoded(step_of(half, 4), TEXTS, [{}, {}, {}, {}])
    for text, logits in zip(TEXTS, got, strict=True):
        with torch.no_grad():
            exact, modules = (base.model(torch.tensor([text])).logits[0].float() for base in (full, half))
        assert distance(logits, exact) < 0.75 * distance(modules, exact)


def test_stacks_in_bfloat16(tiny_base_folder: Folder) -> None:
    folder = tiny_base_folder("llama")
    half, full = load(folder, "bfloat16"), load(folder)
    for target, source in zip(full.model.parameters(), half.model.parameters(), strict=True):
        target.data.copy_(source.data)
    # All experts of this one are active: a choice between two that are nearly as likely may fall otherwise.
    config = CONFIGS[2]
    projections = random_projections(half.geometry, config, seed=2)
    stack = to_serving(half.geometry, config, projections, dtype=half.dtype, panelled=True)
    same = to_serving(full.geometry, config, projections, panelled=True)
    same.memory.copy_(stack.memory)
    weights = (1.0, 0.0, 0.5, 2.0)
    exact = decoded(step_of(full, 4), TEXTS, [{same: weight} for weight in weights])
    rounded = decoded(step_of(half, 4), TEXTS, [{stack: weight} for weight in weights])
    without = decoded(step_of(full, 4), TEXTS, [{}, {}, {}, {}])
    for logits, expected, base_only, weight in zip(rounded, exact, without, weights, strict=True):
        assert distance(logits, expected) < 0.03
        assert weight == 0.0 or distance(base_only, expected) > 0.1  # the stack does change something


def test_a_broken_stack_reaches_only_the_rows_that_use_it(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    config = CONFIGS[0]
    broken = {
        key: ProjectionTensors(a=tensors.a * torch.inf, b=tensors.b, gate=tensors.gate * torch.nan)
        for key, tensors in random_projections(base.geometry, config, seed=1).items()
    }
    stack = to_serving(base.geometry, config, broken, panelled=True)
    step = step_of(base, 2)
    beside, spoilt = decoded(step, [TEXTS[0], TEXTS[0]], [{}, {stack: 1.0}])
    [alone] = decoded(step, [TEXTS[0]], [{}])
    assert spoilt.isnan().all()
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0.0)


def test_a_stack_at_weight_zero_is_not_computed(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    config = CONFIGS[0]
    infinite = {
        key: replace(tensors, b=tensors.b * torch.inf)
        for key, tensors in random_projections(base.geometry, config, seed=1).items()
    }
    stack = to_serving(base.geometry, config, infinite, panelled=True)
    step = step_of(base, 1)
    [with_it], [without] = decoded(step, [TEXTS[1]], [{stack: 0.0}]), decoded(step, [TEXTS[1]], [{}])
    assert torch.equal(with_it, without)


def test_equal_logits_choose_the_first_experts_and_no_expert_twice(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    config = MoeLoraConfig(4, 4, 2, 4.0)
    drawn = random_projections(base.geometry, config, seed=3)
    tied = {key: replace(tensors, gate=torch.zeros_like(tensors.gate)) for key, tensors in drawn.items()}
    first_two = {
        key: ProjectionTensors(a=tensors.a[:2], b=tensors.b[:2], gate=torch.zeros_like(tensors.gate[:2]))
        for key, tensors in drawn.items()
    }
    pair = MoeLoraConfig(2, 4, 2, 4.0)
    step = step_of(base, 1)
    [got] = decoded(step, [TEXTS[0]], [{to_serving(base.geometry, config, tied, panelled=True): 1.0}])
    [expected] = decoded(step, [TEXTS[0]], [{to_serving(base.geometry, pair, first_two, panelled=True): 1.0}])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)


def narrowed_all(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = narrowed(values[i], out)


def widened_all(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = widened(values[i])


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    # Ties to even on both sides, the largest that rounds to infinity, subnormals, and what is no number.
    special = [1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.4e38, -3.4e38, 1e-40, -0.0, float("inf"), float("-inf"), float("nan")]
    values = torch.cat([torch.randn(5000) * 100, torch.tensor(special)])
    expected = values.bfloat16()
    compiled = np.zeros(len(values), np.uint16)
    njit(narrowed_all)(values.numpy(), compiled)
    plain = np.array([narrowed(value, compiled) for value in values.numpy()], np.uint16)
    for bits in (compiled, plain):
        got = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    back = np.zeros(len(values), np.float32)
    njit(widened_all)(compiled, back)
    torch.testing.assert_close(torch.from_numpy(back), expected.float(), rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(np.array([widened(bits) for bits in compiled]), back, equal_nan=True)
    assert memory_at(compiled.ctypes.data, len(values), compiled).tolist() == compiled.tolist()


def test_weights_are_held_once(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    before = {site.path: site.module.weight.clone() for site in base.sites}  # type: ignore[operator]
    step_of(base, 1)
    memory: Any = base.sites[0].module.weight
    for site in base.sites[:3]:  # q, k and v of the first layer
        weight: Any = site.module.weight
        assert torch.equal(weight, before[site.path])
        assert weight.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


@pytest.mark.parametrize("reason", ["packed", "float16"])
def test_no_fused_step_where_it_would_not_be_exact(reason: str, tiny_base_folder: Folder) -> None:
    folder = str(tiny_base_folder("llama"))
    base = load_base(folder, base_format="nf4") if reason == "packed" else load_base(folder, dtype="float16")
    cache = torch.zeros(3, 2, SPAN, 16, dtype=base.dtype)
    assert make_fused_step(base, cache, cache.clone()) is None
