"""A stack comes back from its file as it went in, in the layout that is promised."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open

from stack_store.errors import DigestMismatch, StackInvalid
from stack_store.format import (
    INPUT_GROUPS,
    PROJECTIONS,
    Geometry,
    GroupTensors,
    ProjectionTensors,
    Stack,
    pack_groups,
    read_stack,
    read_verified_header,
    resident_bytes,
    unpack_projections,
    verify_stack,
    write_stack,
)
from tests.fakes import random_projections, tiny_geometry, tiny_header, write_random_stack


def test_a_bf16_stack_comes_back_bit_for_bit(tmp_path: Path) -> None:
    header = tiny_header()
    projections = random_projections(header)
    digest = write_stack(tmp_path / "stack", header, pack_groups(header, projections))
    stack = read_stack(tmp_path / "stack", expected_digest=digest, dtype=torch.float32)
    assert stack.header == header
    unpacked = unpack_projections(stack)
    assert list(unpacked) == [(layer, name) for layer in range(2) for name in PROJECTIONS]
    for key, tensors in projections.items():
        for part in ("a", "b", "gate"):
            assert torch.equal(getattr(unpacked[key], part), getattr(tensors, part)), (key, part)


def test_an_int8_stack_comes_back_within_half_a_scale_of_each_row(tmp_path: Path) -> None:
    header = tiny_header(weights="int8")
    projections = random_projections(header)
    write_stack(tmp_path / "stack", header, pack_groups(header, projections))
    unpacked = unpack_projections(read_stack(tmp_path / "stack", dtype=torch.float32))
    for key, tensors in projections.items():
        a_scale = tensors.a.abs().amax(dim=2, keepdim=True) / 127  # (E, R, 1): a row is one rank of one expert
        b_scale = tensors.b.abs().amax(dim=1, keepdim=True) / 127  # (E, 1, R)
        assert ((unpacked[key].a - tensors.a).abs() <= a_scale * 0.5001).all()
        assert ((unpacked[key].b - tensors.b).abs() <= b_scale * 0.5001).all()
        assert torch.equal(unpacked[key].gate, tensors.gate)


def test_int8_halves_the_file(tmp_path: Path) -> None:
    geometry = tiny_geometry(hidden=256, kv=128, intermediate=512)
    num_bytes = {}
    choices: tuple[Literal["bf16", "int8"], ...] = ("bf16", "int8")
    for weights in choices:
        write_random_stack(tmp_path / weights, tiny_header(geometry=geometry, weights=weights))
        num_bytes[weights] = (tmp_path / weights).stat().st_size
    assert num_bytes["int8"] < 0.6 * num_bytes["bf16"]


def test_packing_puts_every_number_where_the_layout_says() -> None:
    header = tiny_header()
    projections = random_projections(header)
    for (layer, group), packed in pack_groups(header, projections).items():
        offset = 0
        for p, name in enumerate(INPUT_GROUPS[group]):
            tensors, width = projections[layer, name], header.geometry.shapes[name][1]
            for e in range(4):
                assert torch.equal(packed.gate[p * 4 + e], tensors.gate[e])
                for r in range(3):
                    assert torch.equal(packed.a[(p * 4 + e) * 3 + r], tensors.a[e, r])
                    assert torch.equal(packed.b[e * 3 + r, offset : offset + width], tensors.b[e, :, r])
            offset += width
        assert packed.b.shape == (12, offset)


def test_other_readers_of_safetensors_read_the_same(tmp_path: Path) -> None:
    digest = write_random_stack(tmp_path / "stack", tiny_header())
    ours = read_stack(tmp_path / "stack", expected_digest=digest)
    with safe_open(tmp_path / "stack", framework="pt") as file:
        assert file.metadata()["domain"] == "math"
        assert json.loads(file.metadata()["geometry"])["num_layers"] == 2
        for (layer, group), tensors in ours.groups.items():
            name = f"layers.{layer:03d}.{list(INPUT_GROUPS).index(group)}_{group}"
            for part in ("a", "b", "gate"):
                assert torch.equal(file.get_tensor(f"{name}.{part}"), getattr(tensors, part))


def test_a_bf16_file_lies_on_disk_in_paging_order(tmp_path: Path) -> None:
    write_random_stack(tmp_path / "stack", tiny_header())
    written = _file_header(tmp_path / "stack")
    del written["__metadata__"]
    in_file_order = sorted(written, key=lambda name: written[name]["data_offsets"])
    groups = [name.rsplit(".", 1)[0] for name in in_file_order[::3]]
    expected = [f"layers.{layer:03d}.{i}_{group}" for layer in range(2) for i, group in enumerate(INPUT_GROUPS)]
    assert groups == expected


def test_equal_stacks_have_equal_bytes(tmp_path: Path) -> None:
    digests = {write_random_stack(tmp_path / str(i), tiny_header()) for i in range(8)}
    assert len(digests) == 1
    # safetensors orders metadata at random, anew in each process.
    metadata = list(_file_header(tmp_path / "0")["__metadata__"])
    assert metadata == sorted(metadata)


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    header = tiny_header()
    digest = write_random_stack(tmp_path / "stack", header)
    assert verify_stack(tmp_path / "stack") == (header, digest)
    with pytest.raises(DigestMismatch, match=f"has digest {digest}, not 0000"):
        read_stack(tmp_path / "stack", expected_digest="0000")


def test_the_header_comes_back_from_the_head_of_the_file(tmp_path: Path) -> None:
    header = replace(tiny_header(domain="médecine", round=7, weights="int8"), null_space_folded=True, scale=2.5)
    write_random_stack(tmp_path / "stack", header)
    path = tmp_path / "stack"
    assert verify_stack(path)[0] == header
    assert read_verified_header(path, num_bytes=path.stat().st_size) == header
    with pytest.raises(StackInvalid, match=rf"has {path.stat().st_size} bytes, not 7"):
        read_verified_header(path, num_bytes=7)
    path.write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    with pytest.raises(StackInvalid, match="its header cannot be read"):
        read_verified_header(path, num_bytes=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_resident_bytes_are_those_of_the_tensors(
    tmp_path: Path, dtype: torch.dtype, weights: Literal["bf16", "int8"]
) -> None:
    header = tiny_header(weights=weights)
    write_random_stack(tmp_path / "stack", header)
    groups = read_stack(tmp_path / "stack", dtype=dtype).groups.values()
    tensors = [tensor for group in groups for tensor in (group.a, group.gate, group.b)]
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)
    assert resident_bytes(header, dtype) == sum(tensor.nbytes for tensor in tensors)


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    header = tiny_header()
    projections = random_projections(header)
    projections[1, "o_proj"].b[0, 0, 0] = 1e6
    write_stack(tmp_path / "stack", header, pack_groups(header, projections))
    assert torch.isfinite(read_stack(tmp_path / "stack", dtype=torch.float32).groups[1, "o"].b).all()
    with pytest.raises(StackInvalid, match=r"'layers.001.1_o.b' holds a value that is not finite in torch.float16"):
        read_stack(tmp_path / "stack", dtype=torch.float16)


def test_a_value_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    header = tiny_header()
    projections = random_projections(header)
    projections[1, "up_proj"].gate[2, 3] = float("inf")
    with pytest.raises(ValueError, match=r"'layers.001.2_gate_up.gate' holds a value that is not finite"):
        write_stack(tmp_path / "stack", header, pack_groups(header, projections))
    assert list(tmp_path.iterdir()) == []


def test_a_misshapen_group_is_never_written(tmp_path: Path) -> None:
    header = tiny_header()
    groups = pack_groups(header, random_projections(header))
    good = groups[0, "qkv"]
    groups[0, "qkv"] = GroupTensors(a=good.a[1:], gate=good.gate, b=good.b)
    with pytest.raises(ValueError, match=r"'layers.000.0_qkv.a' has shape \[35, 8\], must be \[36, 8\]"):
        write_stack(tmp_path / "stack", header, groups)
    del groups[0, "qkv"]
    with pytest.raises(ValueError, match=r"groups differ from the header's: \[\(0, 'qkv'\)\]"):
        write_stack(tmp_path / "stack", header, groups)
    assert list(tmp_path.iterdir()) == []


def test_projections_that_do_not_fit_the_header_are_not_packed() -> None:
    header = tiny_header()
    projections = random_projections(header)
    good = projections.pop((1, "q_proj"))
    with pytest.raises(ValueError, match=r"\(1, 'q_proj'\)"):
        pack_groups(header, projections)
    projections[1, "q_proj"] = ProjectionTensors(a=good.a, b=good.b.transpose(1, 2), gate=good.gate)
    with pytest.raises(ValueError, match=r"layer 1 q_proj b has shape \[4, 3, 8\], must be \[4, 8, 3\]"):
        pack_groups(header, projections)


def test_packing_and_unpacking_undo_each_other() -> None:
    header = tiny_header()
    groups = pack_groups(header, random_projections(header))
    again = pack_groups(header, unpack_projections(Stack(header=header, groups=groups)))
    for key, tensors in groups.items():
        assert torch.equal(again[key].a, tensors.a)
        assert torch.equal(again[key].b, tensors.b)
        assert torch.equal(again[key].gate, tensors.gate)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("num_experts", 0, "num_experts is 0"),
        ("rank", 2.0, "rank is 2.0"),
        ("top_k", 5, "top_k is 5, more than the 4 experts"),
        ("round", True, "round is True"),
        ("scale", 0.0, "scale is 0.0"),
        ("scale", float("nan"), "scale is nan"),
        ("scale", 10**400, "scale is 1000"),
        ("base_fingerprint", "", "base_fingerprint is ''"),
        ("recipe_digest", None, "recipe_digest is None"),
        ("null_space_folded", 1, "null_space_folded is 1"),
        ("weights", "int4", "weights is 'int4', this build knows bf16, int8"),
        ("kind", "latent", "kind is 'latent'"),
        ("format_version", 2, "format_version is 2"),
    ],
)
def test_an_impossible_header_is_refused_by_field(field: str, value: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        replace(tiny_header(), **{field: value})  # type: ignore[arg-type]


def test_an_impossible_geometry_is_refused_by_name() -> None:
    shapes = dict(tiny_geometry().shapes)
    with pytest.raises(ValueError, match="num_layers is 0"):
        Geometry(num_layers=0, shapes=shapes)
    with pytest.raises(ValueError, match="input group 'qkv' differ in in_features: \\[7, 8\\]"):
        Geometry(num_layers=1, shapes={**shapes, "v_proj": (7, 4)})
    with pytest.raises(ValueError, match="o_proj out_features is -1"):
        Geometry(num_layers=1, shapes={**shapes, "o_proj": (8, -1)})
    del shapes["up_proj"]
    with pytest.raises(ValueError, match="a geometry has the projections"):
        Geometry(num_layers=1, shapes=shapes)


def _file_header(path: Path) -> dict[str, dict[str, list[int]]]:
    raw = path.read_bytes()
    header: dict[str, dict[str, list[int]]] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header
