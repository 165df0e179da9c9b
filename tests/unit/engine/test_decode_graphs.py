"""Decode steps at static addresses against transformers' own forward with slowly added stacks.

Without a GPU the kernels run in Triton's interpreter, on the same addresses.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention import install_attention
from engine.block_table import BLOCK_TOKENS, BlockTable
from engine.decode_graphs import MOST_STACKS, DecodeGraphs
from engine.engine import Engine
from engine.model.base import Base, load_base
from engine.model.fused_step import FusedRow
from engine.model.inject import inject
from engine.model.moe_lora import MoeLoraConfig, ServingDeltas, ServingStack, StackPack
from engine.runner import Runner
from engine.slots import ResidentDomain
from engine.types import SamplingParams
from tests.engines import Client, collect
from tests.reference import ReferenceModel
from tests.stacks import random_projections, to_serving

CONFIGS = [MoeLoraConfig(4, 4, 2, 4.0), MoeLoraConfig(2, 8, 1, 2.0), MoeLoraConfig(3, 2, 3, 4.0)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_ROWS = 4
BLOCKS_OF_ROW = 2
# The interpreter is slow, and slowest with stacks: the text that goes on into a second block has none.
TEXTS = [[5, 9, 200, 31, 7, 90, 11, *range(20, 31)], [80, 81, 82], [3, 4, 5, 6]]
MIXES: list[dict[int, float]] = [{}, {0: 1.0, 2: 0.5}, {0: 0.2, 1: 0.9, 2: 0.0}]
Folder = Callable[[str], Path]


def load(folder: Path, dtype: Any = "float32") -> Base:
    return load_base(str(folder), base_format="dense", dtype=dtype, device=DEVICE)


def graphs_of(base: Base) -> DecodeGraphs:
    """Their cache has two blocks for each row, and one for padding."""
    config = base.text_config
    num_positions = (MAX_ROWS * BLOCKS_OF_ROW + 1) * BLOCK_TOKENS
    shape = (2, base.num_layers, config.num_key_value_heads, num_positions, config.head_dim)
    keys, values = torch.zeros(shape, dtype=base.dtype, device=base.device)
    deltas = ServingDeltas()
    install_attention(base.model)
    inject(base.sites, deltas)
    return DecodeGraphs(base, deltas, keys, values, max_rows=MAX_ROWS, max_blocks=BLOCKS_OF_ROW)


def stacks_of(base: Base) -> list[ServingStack]:
    return [
        to_serving(
            base.geometry, config, random_projections(base.geometry, config, seed=number), dtype=base.dtype,
            round=number + 1, device=base.device,
        )
        for number, config in enumerate(CONFIGS)
    ]  # fmt: skip


def decoded(graphs: DecodeGraphs, texts: list[list[int]], mixes: list[dict[ServingStack, float]]) -> list[torch.Tensor]:
    """The logits behind every token of every row. Rows end with their text, so the batch shrinks."""
    tables = [BlockTable.of([2 * row + 1, 2 * row]) for row in range(len(texts))]
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    for past in range(max(map(len, texts))):
        numbers = [number for number, text in enumerate(texts) if past < len(text)]
        rows = [FusedRow([texts[n][past]], tables[n], past, mixes[n], True) for n in numbers]
        assert all(map(graphs.takes, rows))
        for number, values in zip(numbers, graphs.run(rows).cpu(), strict=True):
            logits[number].append(values)
    return [torch.stack(values) for values in logits]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_row_has_the_logits_of_the_plain_forward(architecture: str, tiny_base_folder: Folder) -> None:
    """Blocks out of order, a window (Gemma 3), a batch that is padded, and stacks of three shapes."""
    base, reference = load(tiny_base_folder(architecture)), ReferenceModel(tiny_base_folder(architecture))
    stacks = stacks_of(base)
    got = decoded(graphs_of(base), TEXTS, [{stacks[i]: w for i, w in mix.items()} for mix in MIXES])
    for text, mix, logits in zip(TEXTS, MIXES, got, strict=True):
        drawn = [(CONFIGS[i], random_projections(base.geometry, CONFIGS[i], seed=i), w) for i, w in mix.items()]
        torch.testing.assert_close(logits, reference.logits(text, drawn), atol=2e-4, rtol=1e-4)


def test_bfloat16_rounds_about_as_the_modules_do(tiny_base_folder: Folder) -> None:
    base, reference = load(tiny_base_folder("llama"), "bfloat16"), ReferenceModel(tiny_base_folder("llama"))
    stack, text = stacks_of(base)[0], TEXTS[0][:5]
    expected = reference.logits(text, [(CONFIGS[0], random_projections(base.geometry, CONFIGS[0], seed=0), 0.5)])
    graphs, deltas = graphs_of(base), ServingDeltas()
    paged = decoded(graphs, [text], [{stack: 0.5}])[0]
    inject(base.sites, deltas)
    deltas.current = StackPack([stack]).step(torch.full((len(text), 1), 0.5))
    with torch.inference_mode():
        ids = torch.tensor([text], device=base.device)
        by_modules = base.head(base.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]).cpu()
    paged_error, modules_error = ((logits.float() - expected).abs().mean() for logits in (paged, by_modules))
    assert 0 < paged_error < 1.5 * modules_error


@pytest.mark.filterwarnings("ignore:.*value encountered:RuntimeWarning")  # the interpreter computes with numpy
def test_a_broken_stack_reaches_only_the_rows_that_use_it(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    good, broken, _ = stacks_of(base)
    graphs = graphs_of(base)
    alone = decoded(graphs, TEXTS[1:2], [{good: 0.5}])[0]
    broken.memory.fill_(torch.nan)
    beside, _ = decoded(graphs, [TEXTS[1], TEXTS[1]], [{good: 0.5, broken: 0.0}, {broken: 1.0}])
    torch.testing.assert_close(beside, alone)


def test_what_has_no_room_is_left_to_the_modules(tiny_base_folder: Folder) -> None:
    base = load(tiny_base_folder("llama"))
    graphs, table = graphs_of(base), BlockTable.of([0])
    config = MoeLoraConfig(2, 65, 1)
    large = to_serving(base.geometry, config, random_projections(base.geometry, config, seed=0))
    many = {stack: 1.0 for _ in range(MOST_STACKS) for stack in stacks_of(base)}
    assert graphs.takes(FusedRow([1], table, 0, {}, True))
    assert not graphs.takes(FusedRow([1], table, 0, {large: 1.0}, True))
    assert not graphs.takes(FusedRow([1], table, 0, many, True))
    assert not graphs.takes(FusedRow([1, 2], table, 0, {}, True))
    assert not graphs.takes(FusedRow([1], table, 0, {}, True, states_layer=0))


def test_an_engine_that_decodes_at_static_addresses_says_the_same(
    tiny_base_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through chunks, shared blocks and two mixes side by side."""
    base = load(tiny_base_folder("llama"))
    stacks = stacks_of(base)
    mixes = [((ResidentDomain("math", "1", (stacks[0],)), 0.7),), ((ResidentDomain("law", "1", (stacks[1],)), 1.0),)]
    answers: list[list[list[int]]] = []
    for is_static in (False, True):
        monkeypatch.setattr("engine.engine.Runner", partial(Runner, static_decode=is_static))
        engine = Engine(base, max_batch_rows=2, max_model_len=64, kv_cache_tokens=128, fused_step=False)
        engine.start()
        client, sampling = Client(engine), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        running = [client.submit(TEXTS[0], sampling, mix)[1] for mix in mixes]
        answers.append([collect(events).token_ids for events in running])
        engine.stop()
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """By Triton's compiler and NVIDIA's assembler, which need no GPU; in a process that does not interpret kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.compile_decode_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 8  # four kernels for two architectures
