"""Every reader refuses a bad file with a message that names the fault, and a store that is offered it is unchanged."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stack_store.errors import StackIncompatible, StackInvalid, StoreError
from stack_store.format import read_stack, read_verified_header, verify_stack
from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.unit.stack_store.listing import list_store

Fault = Callable[[Path], None]
A = "layers.001.0_qkv.a"


def _edit_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Fault:
    def apply(path: Path) -> None:
        tensors, metadata = load_file(path), _head(path)["__metadata__"]
        edit(tensors)
        save_file(tensors, path, metadata)

    return apply


def _edit_metadata(**changes: str | None) -> Fault:
    def apply(path: Path) -> None:
        metadata = {**_head(path)["__metadata__"], **changes}
        save_file(load_file(path), path, {name: text for name, text in metadata.items() if text is not None})

    return apply


def _edit_head(edit: Callable[[dict[str, Any]], Any]) -> Fault:
    def apply(path: Path) -> None:
        head = _head(path)
        edit(head)
        _write_head(path, json.dumps(head).encode())

    return apply


def _replace_head(text: bytes) -> Fault:
    return lambda path: _write_head(path, text)


def _cut(keep: Callable[[int], int]) -> Fault:
    def apply(path: Path) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw[: keep(len(raw))])

    return apply


def _head(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    head: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return head


def _write_head(path: Path, text: bytes) -> None:
    raw = path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def _set_value(name: str, value: float) -> Fault:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return _edit_tensors(edit)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": list(range(1000))}))


def _torch_archive(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path)


def _text(path: Path) -> None:
    path.write_text("hello, world, this is no stack")


def _a_byte_more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


HEAD_FAULTS: dict[str, tuple[Fault, str]] = {
    "empty file": (_cut(lambda length: 0), "is not a safetensors file"),
    "five bytes": (_cut(lambda length: 5), "is not a safetensors file"),
    "cut in the head": (_cut(lambda length: 200), "is truncated: the header alone is"),
    "cut in the body": (_cut(lambda length: length - 5000), "is truncated: the header promises"),
    "cut by a byte": (_cut(lambda length: length - 1), "is truncated: the header promises"),
    "a byte too long": (_a_byte_more, "has 1 bytes after its last"),
    "pickle": (_pickle, "is not a safetensors file"),
    "torch archive": (_torch_archive, "is not a safetensors file"),
    "text": (_text, "is not a safetensors file"),
    "head is not JSON": (_replace_head(b"{'a': 1}"), "its header is not valid JSON"),
    "head is nested without end": (_replace_head(b'{"a":' + b"[" * 100_000), "its header is not valid JSON"),
    "head names a tensor twice": (_replace_head(b'{"x":1,"x":2}'), "key 'x' appears twice"),
    "metadata is a list": (_replace_head(b'{"__metadata__":[]}'), "its metadata is not a map of texts"),
    "metadata holds a number": (_replace_head(b'{"__metadata__":{"a":1}}'), "its metadata is not a map of texts"),
    "no metadata": (_edit_head(lambda head: head.pop("__metadata__")), "format_version is None"),
    "tensor without shape": (_edit_head(lambda head: head[A].pop("shape")), f"'{A}' is not described by dtype, shape"),
    "tensor with more": (_edit_head(lambda head: head[A].update(x=1)), f"'{A}' is not described by dtype, shape"),
    "negative shape": (_edit_head(lambda head: head[A].update(shape=[-36, -8])), r"has the shape \[-36, -8\]"),
    "shape of truth": (_edit_head(lambda head: head[A].update(shape=[True, 8])), r"has the shape \[True, 8\]"),
    "shape of too many dimensions": (_edit_head(lambda head: head[A].update(shape=[1] * 9)), "has the shape"),
    "wrong byte count": (_edit_head(lambda head: head[A].update(shape=[36, 9])), r"which BF16 \[36, 9\] does not fill"),
    "unknown dtype": (_edit_head(lambda head: head[A].update(dtype="F8_E4M3")), "has the unknown dtype 'F8_E4M3'"),
    "overlap": (_edit_head(lambda head: head[A].update(data_offsets=[0, 576])), "begins at byte 0, not at"),
    "missing tensor": (_edit_tensors(lambda tensors: tensors.pop(A)), f"tensor '{A}' is missing"),
    "extra tensor": (
        _edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))),
        "tensor 'extra' does not belong",
    ),
    "extra layer": (
        _edit_tensors(lambda tensors: tensors.update({A.replace("001", "002"): tensors[A].clone()})),
        "tensor 'layers.002.0_qkv.a' does not belong",
    ),
    "wrong shape": (
        _edit_tensors(lambda tensors: tensors.update({A: tensors[A].T.contiguous()})),
        rf"tensor '{A}' has shape \[8, 36\], must be \[36, 8\]",
    ),
    "wrong dtype": (
        _edit_tensors(lambda tensors: tensors.update({A: tensors[A].half()})),
        f"tensor '{A}' is torch.float16, must be torch.bfloat16",
    ),
    "int8 without saying so": (
        _edit_tensors(lambda tensors: tensors.update({A: tensors[A].to(torch.int8)})),
        f"tensor '{A}' is torch.int8, must be torch.bfloat16",
    ),
    "int8 said, bf16 inside": (_edit_metadata(weights="int8"), "is torch.bfloat16, must be torch.int8"),
    "unknown field": (_edit_metadata(author="me"), "metadata is wrong: it has the unknown author"),
    "missing field": (_edit_metadata(rank=None), "metadata is wrong: it lacks rank"),
    "field is not JSON": (_edit_metadata(rank="three"), "rank is 'three', which is not JSON"),
    "field of another type": (_edit_metadata(rank='"3"'), "rank is '3', must be a whole number"),
    "endless layers": (
        _edit_metadata(geometry=json.dumps({"num_layers": 10**15, "shapes": dict(tiny_geometry().shapes)})),
        "tensor 'layers.002.0_qkv.a' is missing",
    ),
    "endless scale": (_edit_metadata(scale="1e999"), "scale is inf"),
    "geometry is a list": (_edit_metadata(geometry="[1]"), r"geometry is \[1\]"),
    "geometry lacks a projection": (_edit_metadata(geometry='{"num_layers":2,"shapes":{}}'), "a geometry has the proj"),
    "later format": (_edit_metadata(format_version="2", novelty="x"), "format_version is '2', this build knows 1"),
    "other kind": (_edit_metadata(kind="latent_moe"), "kind is 'latent_moe'"),
}

VALUE_FAULTS: dict[str, tuple[Fault, str]] = {
    "nan": (_set_value(A, float("nan")), f"tensor '{A}' holds a value that is not finite"),
    "infinity": (_set_value("layers.000.3_down.b", float("inf")), "tensor 'layers.000.3_down.b' holds a value"),
    "nan in the last gate": (_set_value("layers.001.3_down.gate", float("nan")), "'layers.001.3_down.gate' holds"),
}


@pytest.mark.parametrize("fault", HEAD_FAULTS)
def test_a_bad_head_is_refused_by_every_reader(tmp_path: Path, fault: str) -> None:
    apply, message = HEAD_FAULTS[fault]
    path = tmp_path / "bad.safetensors"
    write_random_stack(path, tiny_header())
    apply(path)
    for read in (read_stack, verify_stack):
        with pytest.raises(StackInvalid, match=rf"bad.safetensors: .*{message}"):
            read(path)


@pytest.mark.parametrize("fault", VALUE_FAULTS)
def test_a_bad_value_is_refused_by_whoever_reads_values(tmp_path: Path, fault: str) -> None:
    apply, message = VALUE_FAULTS[fault]
    path = tmp_path / "bad.safetensors"
    write_random_stack(path, tiny_header())
    apply(path)
    assert read_verified_header(path, num_bytes=path.stat().st_size) == tiny_header()
    for read in (read_stack, verify_stack):
        with pytest.raises(StackInvalid, match=rf"bad.safetensors: .*{message}"):
            read(path)


@pytest.mark.parametrize("name", ["layers.001.0_qkv.a_scale", "layers.000.2_gate_up.b_scale"])
def test_an_int8_scale_that_is_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    write_random_stack(path, tiny_header(weights="int8"))
    _set_value(name, float("nan"))(path)
    for read in (read_stack, verify_stack):
        with pytest.raises(StackInvalid, match=f"'{name}' holds a value that is not finite"):
            read(path)


@pytest.mark.parametrize("fault", [*HEAD_FAULTS, *VALUE_FAULTS])
def test_a_store_that_is_offered_a_bad_file_is_unchanged(tmp_path: Path, fault: str) -> None:
    apply, message = (HEAD_FAULTS | VALUE_FAULTS)[fault]
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    write_random_stack(good, tiny_header(round=1))
    write_random_stack(bad, tiny_header(round=2), seed=1)
    apply(bad)
    registry = StackRegistry.create(tmp_path / "store", base_fingerprint="tiny-base", geometry=tiny_geometry())
    registry.register_domain("math", [good])
    before = list_store(tmp_path / "store")
    with pytest.raises(StackInvalid, match=message):
        registry.register_domain("math", [good, bad])
    assert list_store(tmp_path / "store") == before
    assert registry.manifest.generation == 1


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (tiny_header(base_fingerprint="other-base"), "is for base 'other-base', not for 'tiny-base'"),
        (tiny_header(geometry=tiny_geometry(num_layers=3)), "fits a base of Geometry\\(num_layers=3"),
        (tiny_header(geometry=tiny_geometry(kv=8)), "fits a base of Geometry"),
    ],
)
def test_a_stack_of_a_foreign_base_is_refused(tmp_path: Path, header: Any, fault: str) -> None:
    write_random_stack(tmp_path / "foreign", header)
    registry = StackRegistry.create(tmp_path / "store", base_fingerprint="tiny-base", geometry=tiny_geometry())
    before = list_store(tmp_path / "store")
    for dry_run in (False, True):
        with pytest.raises(StackIncompatible, match=fault) as refusal:
            registry.register_domain("math", [tmp_path / "foreign"], dry_run=dry_run)
        assert isinstance(refusal.value, StoreError)
    assert list_store(tmp_path / "store") == before
