"""The stack file: the only code that knows its layout. Knows tensors and one file, not stores, domains or devices.

Longer than most files because reading, writing and the two layouts of a stack must agree line by line.

A stack file is a safetensors file. Its metadata is the StackHeader. Its tensors are packed per layer and input group,
since few large tensors load several times faster than hundreds of small ones:

    layers.{layer:03d}.{i}_{group}.a        (PER, I)   bf16, or int8 with .a_scale (PER,) float32
    layers.{layer:03d}.{i}_{group}.b        (ER, ΣO)   bf16, or int8 with .b_scale (ER, P) float32
    layers.{layer:03d}.{i}_{group}.gate     (PE, I)    bf16

Legend: E experts, R rank, I in features, O out features of a projection, P projections that share an input group, ΣO
their O added up. PER means P·E·R rows, counted projection first, then expert, then rank.
safetensors lays tensors out by dtype, then by name, so a bf16 file lies on disk in the order in which it is paged.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from stack_store.atomic import replace_file
from stack_store.errors import DigestMismatch, StackInvalid
from stack_store.header import FORMAT_VERSION as FORMAT_VERSION
from stack_store.header import INPUT_GROUPS as INPUT_GROUPS
from stack_store.header import PROJECTIONS as PROJECTIONS
from stack_store.header import Geometry as Geometry
from stack_store.header import StackHeader as StackHeader
from stack_store.header import from_metadata, to_metadata
from stack_store.int8 import dequantise_rows, quantise_rows
from stack_store.tensor_file import LENGTH_BYTES, TensorFile, is_finite

PARTS = ("a", "b", "gate", "a_scale", "b_scale")
METADATA_FIRST = '{"__metadata__":'
NO_PART = -1  # of a bf16 file, which has no scales


@dataclass(frozen=True, slots=True)
class ProjectionTensors:
    """Training layout of one projection in one layer."""

    a: Tensor  # (E, R, I)
    b: Tensor  # (E, O, R)
    gate: Tensor  # (E, I)


@dataclass(frozen=True, slots=True)
class GroupTensors:
    """Serving layout of one input group in one layer."""

    a: Tensor  # (PER, I)
    gate: Tensor  # (PE, I)
    b: Tensor  # (ER, ΣO): row (e, r) holds B[e, :, r] of each projection side by side


@dataclass(frozen=True, slots=True)
class Stack:
    """One round of one domain, on the host."""

    header: StackHeader
    groups: Mapping[tuple[int, str], GroupTensors]  # (layer, group), in paging order


def pack_groups(
    header: StackHeader, projections: Mapping[tuple[int, str], ProjectionTensors]
) -> dict[tuple[int, str], GroupTensors]:
    """Training layout of every (layer, projection) -> serving layout, detached, in the dtype given.

    Raises ValueError, naming the tensor, unless exactly the header's projections are there in its shapes.
    """
    expected = [(layer, name) for layer in range(header.geometry.num_layers) for name in PROJECTIONS]
    if set(projections) != set(expected):
        raise ValueError(f"projections differ from the header's: {sorted(set(projections) ^ set(expected))[:8]}")
    for layer, name in expected:
        _require_projection_shapes(header, layer, name, projections[layer, name])
    return {
        (layer, group): _pack_group([projections[layer, name] for name in INPUT_GROUPS[group]])
        for layer, group in _paging_order(header)
    }


def unpack_projections(stack: Stack) -> dict[tuple[int, str], ProjectionTensors]:
    """Serving layout -> training layout of every (layer, projection), as views: the inverse of pack_groups."""
    experts, rank = stack.header.num_experts, stack.header.rank
    unpacked = {}
    for (layer, group), tensors in stack.groups.items():
        names = INPUT_GROUPS[group]
        a_blocks = tensors.a.view(len(names), experts, rank, -1)
        gate_blocks = tensors.gate.view(len(names), experts, -1)
        b_blocks = tensors.b.split_with_sizes(stack.header.geometry.out_features(group), dim=1)
        for name, a, gate, b in zip(names, a_blocks, gate_blocks, b_blocks, strict=True):  # (E, R, I), (E, I), (ER, O)
            unpacked[layer, name] = ProjectionTensors(a=a, b=b.view(experts, rank, -1).transpose(1, 2), gate=gate)
    return unpacked


def write_stack(path: Path, header: StackHeader, groups: Mapping[tuple[int, str], GroupTensors]) -> str:
    """Writes the file atomically and durably; equal arguments give equal bytes. Returns the sha256 of its bytes in hex.

    Raises ValueError, naming the tensor, for one that is missing, extra, misshapen or not finite.
    """
    stored = memoryview(safetensors.torch.save(_tensors_to_store(header, groups), to_metadata(header)))
    head = _head_in_order(stored)
    body = stored[len(head) :]
    with replace_file(path) as file:
        file.write(head)
        file.write(body)
    digest = hashlib.sha256(head)
    digest.update(body)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Window:
    """Some layers of a stack file, whose bytes lie behind each other."""

    begin: int  # in the file
    num_bytes: int
    first_layer: int
    parts: NDArray[np.int64]  # (layers, 4, PARTS): where in the window each part of an input group begins, or NO_PART


class OpenStack:
    """A stack file whose header is known to be good, and whose tensors may be read once: by load or by verify."""

    def __init__(self, file: BufferedReader, *, name: str) -> None:
        """Raises StackInvalid, naming the fault, unless header, names, shapes, dtypes and length are all right."""
        self.name = name
        self._file = TensorFile(file, name=name)
        self.num_bytes = self._file.num_bytes
        try:
            self.header = from_metadata(self._file.metadata)
        except ValueError as error:
            raise self._file.invalid(f"metadata is wrong: {error}") from error
        _require_layout(self._file, self.header)

    def load(self, dtype: torch.dtype) -> tuple[Stack, str]:
        """The stack in dtype, and the file's digest. Raises StackInvalid for a value that is not finite in dtype."""
        stored, digest = self._file.load()
        groups = {
            (layer, group): self._load_group(stored, layer, group, dtype) for layer, group in _paging_order(self.header)
        }
        return Stack(header=self.header, groups=groups), digest

    @property
    def head(self) -> bytes:
        """The file's bytes before its first tensor."""
        return self._file.head

    def windows(self) -> tuple[Window, ...]:
        """The pieces in which the tensors can be read one after the other: a layer each, or else all at once."""
        begins = np.array([self._begins(layer) for layer in range(self.header.geometry.num_layers)])  # (L, 4, parts)
        firsts = [int(layer[layer != NO_PART].min()) for layer in begins]
        ends = [*firsts[1:], self._file.entries[-1].end]
        if any(layer.max() >= end for layer, end in zip(begins, ends, strict=True)):
            return (Window(len(self.head), ends[-1], 0, begins),)
        return tuple(
            Window(
                len(self.head) + first, end - first, number, np.where(layer == NO_PART, NO_PART, layer - first)[None]
            )
            for number, (layer, first, end) in enumerate(zip(begins, firsts, ends, strict=True))
        )

    def _begins(self, layer: int) -> list[list[int]]:
        """Where the parts of each input group begin, behind the head."""
        begins = {entry.name: entry.begin for entry in self._file.entries}
        return [[begins.get(f"{_prefix(layer, group)}.{part}", NO_PART) for part in PARTS] for group in INPUT_GROUPS]

    def verify(self, *, copy_to: BufferedWriter | None = None) -> str:
        """The file's digest, every value being finite. Streams; `copy_to` gets exactly the bytes that were checked."""
        return self._file.verify(copy_to=copy_to)

    def _load_group(self, stored: dict[str, Tensor], layer: int, group: str, dtype: torch.dtype) -> GroupTensors:
        prefix, geometry = _prefix(layer, group), self.header.geometry
        return GroupTensors(
            a=self._load_rows(stored, f"{prefix}.a", [geometry.in_features(group)], dtype),
            gate=self._finite(stored.pop(f"{prefix}.gate").to(dtype), f"{prefix}.gate"),
            b=self._load_rows(stored, f"{prefix}.b", geometry.out_features(group), dtype),
        )

    def _load_rows(self, stored: dict[str, Tensor], name: str, widths: list[int], dtype: torch.dtype) -> Tensor:
        values = stored.pop(name)  # popped, so that stored and restored values are never all held at once
        if self.header.weights == "int8":
            scales = self._finite(stored.pop(f"{name}_scale"), f"{name}_scale").view(-1, len(widths))
            values = dequantise_rows(values, scales, widths, dtype)
        return self._finite(values.to(dtype), name)

    def _finite(self, values: Tensor, name: str) -> Tensor:
        if not is_finite(values):
            raise self._file.invalid(f"tensor {name!r} holds a value that is not finite in {values.dtype}")
        return values


def read_verified_header(path: Path, *, num_bytes: int) -> StackHeader:
    """The header of a stack file of known length that was verified before, in a tenth of the time.

    Its tensors are not looked at; whoever reads them checks them. Raises StackInvalid or OSError.
    """
    with path.open("rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != num_bytes:
            raise StackInvalid(f"{path}: has {actual} bytes, not {num_bytes}")
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        try:
            return from_metadata(_metadata_of(file.read(min(length, num_bytes)).decode()))
        except (ValueError, KeyError, TypeError) as error:
            raise StackInvalid(f"{path}: its header cannot be read: {error}") from error


def _metadata_of(head: str) -> Any:
    """The metadata of a head in JSON; ours come first, and what follows is ten times as long."""
    if not head.startswith(METADATA_FIRST):
        return json.loads(head)["__metadata__"]
    metadata, _ = json.JSONDecoder().raw_decode(head, len(METADATA_FIRST))
    return metadata


def read_stack(path: Path, *, expected_digest: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Stack:
    """The stack at `path`, all tensors in dtype. Raises StackInvalid, naming the fault, or DigestMismatch."""
    with path.open("rb") as file:
        stack, digest = OpenStack(file, name=str(path)).load(dtype)
    if expected_digest not in (None, digest):
        raise DigestMismatch(f"{path} has digest {digest}, not {expected_digest}")
    return stack


def verify_stack(path: Path) -> tuple[StackHeader, str]:
    """The header and digest of the stack at `path`, every byte checked, without ever holding the whole file."""
    with path.open("rb") as file:
        stack = OpenStack(file, name=str(path))
        return stack.header, stack.verify()


def resident_bytes(header: StackHeader, dtype: torch.dtype) -> int:
    """The bytes of a, gate and b of all groups once they are in dtype."""
    values_per_layer = sum(
        math.prod(shape)
        for group in INPUT_GROUPS
        for part, (shape, _) in _group_layout(header, group).items()
        if not part.endswith("_scale")
    )
    return header.geometry.num_layers * values_per_layer * dtype.itemsize


def stored_bytes(header: StackHeader) -> int:
    """The bytes of all tensors in a stack file; its head, which names them, comes on top."""
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in _file_layout(header))


def _paging_order(header: StackHeader) -> Iterator[tuple[int, str]]:
    return ((layer, group) for layer in range(header.geometry.num_layers) for group in INPUT_GROUPS)


def _prefix(layer: int, group: str) -> str:
    return f"layers.{layer:03d}.{list(INPUT_GROUPS).index(group)}_{group}"


def _group_layout(header: StackHeader, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Part of a group -> its shape and its dtype in the file."""
    projections, experts, rank = len(INPUT_GROUPS[group]), header.num_experts, header.rank
    in_features, out_features = header.geometry.in_features(group), sum(header.geometry.out_features(group))
    values = torch.int8 if header.weights == "int8" else torch.bfloat16
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "a": ((projections * experts * rank, in_features), values),
        "b": ((experts * rank, out_features), values),
        "gate": ((projections * experts, in_features), torch.bfloat16),
    }
    if header.weights == "int8":
        layout["a_scale"] = ((projections * experts * rank,), torch.float32)
        layout["b_scale"] = ((experts * rank, projections), torch.float32)
    return layout


def _file_layout(header: StackHeader) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for layer, group in _paging_order(header):
        for part, (shape, dtype) in _group_layout(header, group).items():
            yield f"{_prefix(layer, group)}.{part}", shape, dtype


def _require_layout(file: TensorFile, header: StackHeader) -> None:
    entries = {entry.name: entry for entry in file.entries}
    # Lazy: a header that promises a billion layers fails at the first one that is missing.
    for name, shape, dtype in _file_layout(header):
        entry = entries.pop(name, None)
        if entry is None:
            raise file.invalid(f"tensor {name!r} is missing")
        if entry.dtype != dtype:
            raise file.invalid(f"tensor {name!r} is {entry.dtype}, must be {dtype}")
        if entry.shape != shape:
            raise file.invalid(f"tensor {name!r} has shape {list(entry.shape)}, must be {list(shape)}")
    if entries:
        raise file.invalid(f"tensor {min(entries)!r} does not belong in a stack")


def _require_projection_shapes(header: StackHeader, layer: int, name: str, tensors: ProjectionTensors) -> None:
    experts, rank = header.num_experts, header.rank
    in_features, out_features = header.geometry.shapes[name]
    expected = {"a": (experts, rank, in_features), "b": (experts, out_features, rank), "gate": (experts, in_features)}
    for part, shape in expected.items():
        actual = tuple(getattr(tensors, part).shape)
        if actual != shape:
            raise ValueError(f"layer {layer} {name} {part} has shape {list(actual)}, must be {list(shape)}")


def _pack_group(projections: list[ProjectionTensors]) -> GroupTensors:
    return GroupTensors(
        a=torch.cat([tensors.a.detach().flatten(0, 1) for tensors in projections]),  # (PER, I)
        gate=torch.cat([tensors.gate.detach() for tensors in projections]),  # (PE, I)
        b=torch.cat([tensors.b.detach().transpose(1, 2).flatten(0, 1) for tensors in projections], dim=1),  # (ER, ΣO)
    )


def _tensors_to_store(header: StackHeader, groups: Mapping[tuple[int, str], GroupTensors]) -> dict[str, Tensor]:
    expected = set(_paging_order(header))
    if set(groups) != expected:
        raise ValueError(f"groups differ from the header's: {sorted(set(groups) ^ expected)[:8]}")
    return {
        f"{_prefix(layer, group)}.{part}": values
        for layer, group in _paging_order(header)
        for part, values in _group_to_store(header, layer, group, groups[layer, group]).items()
    }


def _group_to_store(header: StackHeader, layer: int, group: str, tensors: GroupTensors) -> dict[str, Tensor]:
    stored = {}
    layout = _group_layout(header, group)
    for part in ("a", "b", "gate"):
        name, values = f"{_prefix(layer, group)}.{part}", getattr(tensors, part).detach().cpu()
        shape, dtype = layout[part]
        if tuple(values.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {list(values.shape)}, must be {list(shape)}")
        # Asked in bf16, into which a large float32 may not fit.
        if not torch.isfinite(values.to(torch.bfloat16)).all():
            raise ValueError(f"tensor {name!r} holds a value that is not finite")
        if dtype == torch.int8:
            widths = [header.geometry.in_features(group)] if part == "a" else header.geometry.out_features(group)
            values, scales = quantise_rows(values, widths)
            stored[f"{part}_scale"] = scales.view(layout[f"{part}_scale"][0])
        stored[part] = values.to(dtype).contiguous()
    return stored


def _head_in_order(stored: memoryview) -> bytes:
    """The file's head, its metadata sorted: safetensors leaves it in random order, and a digest must be repeatable."""
    length = int.from_bytes(stored[:LENGTH_BYTES], "little")
    header = json.loads(bytes(stored[LENGTH_BYTES : LENGTH_BYTES + length]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length, "sorting changes no length"
    return bytes(stored[:LENGTH_BYTES]) + text
