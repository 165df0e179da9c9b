"""What bases take, computed from their shapes: compared with files, with slow sums, and with the page for operators."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from server.cli import app
from server.sizing import KNOWN, BaseShape, find_shape, known_shapes, shape_of, sizing_tables, stack_sizes
from stack_store.format import PROJECTIONS, OpenStack, resident_bytes, stored_bytes
from stack_store.manifest import read_manifest
from tests.fakes import tiny_header, write_random_stack

DEMO = Path(__file__).parents[3] / "demo" / "store"
PAGE = Path(__file__).parents[3] / "docs" / "sizing.md"


def test_page_for_operators_is_what_the_command_prints() -> None:
    assert sizing_tables(known_shapes(), experts=4, rank=16, rounds=2) in PAGE.read_text()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_stored_bytes_are_those_of_a_file_behind_its_head(tmp_path: Path, weights: str) -> None:
    header = tiny_header(weights=weights)  # type: ignore[arg-type]
    write_random_stack(tmp_path / "stack", header)
    with (tmp_path / "stack").open("rb") as file:
        opened = OpenStack(file, name="stack")
        assert opened.num_bytes - len(opened.head) == stored_bytes(header)


@pytest.mark.parametrize("shape", KNOWN, ids=lambda shape: shape.name)
def test_sizes_are_the_sum_over_projections(shape: BaseShape) -> None:
    experts, rank = 4, 16
    values = sum(
        experts * (rank * num_in + rank * num_out + num_in)  # A, B and gate
        for num_in, num_out in (shape.geometry.shapes[name] for name in PROJECTIONS)
    )
    sizes = stack_sizes(shape, experts=experts, rank=rank)
    assert sizes.bf16_file == sizes.resident == 2 * shape.num_layers * values
    assert 0.5 < sizes.int8_file / sizes.bf16_file < 0.53


def test_known_shape_of_the_embedded_base_is_that_of_the_demo_store() -> None:
    assert KNOWN[0].geometry == read_manifest(DEMO / "manifest.json").geometry


def test_resident_bytes_do_not_depend_on_how_the_file_is_stored() -> None:
    both = [resident_bytes(tiny_header(weights=weights), torch.float32) for weights in ("bf16", "int8")]
    assert both[0] == both[1]


def test_shape_is_read_from_a_folder(tmp_path: Path) -> None:
    qwen = find_shape("Qwen3-8B")
    config = AutoConfig.for_model(
        "qwen3",
        num_hidden_layers=qwen.num_layers,
        hidden_size=qwen.hidden,
        num_attention_heads=qwen.num_heads,
        num_key_value_heads=qwen.num_key_heads,
        head_dim=qwen.head_size,
        intermediate_size=qwen.intermediate,
        vocab_size=qwen.vocabulary,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)) == shape_of(str(tmp_path), config)
    assert find_shape(str(tmp_path)).geometry == qwen.geometry
    result = CliRunner().invoke(app, ["size", "--base", str(tmp_path), "--rounds", "1"])
    assert result.exit_code == 0
    assert f"| {tmp_path.name} | 343 MiB |" in result.stdout


def test_unknown_base_is_one_line_and_status_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["size", "--base", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: base '{tmp_path}' is not one of")
    assert len(result.stderr.splitlines()) == 1
