"""Reads a safetensors file in one pass over one open descriptor. Knows safetensors, not stacks.

safetensors' own reader maps the file: a file that shrinks while it is mapped kills the process, and its bytes can't be
hashed in the pass that checks them. Here every byte is read once, and what was read is what the digest names.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from typing import Any

import torch
from torch import Tensor

from stack_store.errors import StackInvalid

LENGTH_BYTES = 8  # the file begins with the header's length, little-endian
MAX_HEADER_BYTES = 1 << 24  # a hundred times what the largest stack needs; safetensors itself allows 100 MB
MAX_DIMENSIONS = 8
CHUNK_BYTES = 1 << 20  # a multiple of every item size

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes begin..end after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file whose header was read and whose tensors come in file order, each finite."""

    def __init__(self, file: BufferedReader, *, name: str) -> None:
        """Reads the header. Raises StackInvalid, naming the fault, unless the tensors fill the file exactly."""
        self.name = name
        self._file = file
        self._head = self._read_head()
        header = self._parse(self._head[LENGTH_BYTES:])
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        entries = [self._entry(key, value) for key, value in header.items()]
        self.entries = tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end)))
        self._require_tiling()
        self._hash = hashlib.sha256(self._head)

    def invalid(self, fault: str) -> StackInvalid:
        return StackInvalid(f"{self.name}: {fault}")

    def load(self) -> tuple[dict[str, Tensor], str]:
        """All tensors, and the sha256 of the file's bytes in hex. Whether they are finite is left to the caller."""
        tensors = {}
        for entry in self.entries:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            self._read_into(tensor.view(-1).view(torch.uint8).numpy().data, entry.name)
            tensors[entry.name] = tensor
        return tensors, self._hash.hexdigest()

    def verify(self, *, copy_to: BufferedWriter | None = None) -> str:
        """The sha256 of the file's bytes in hex, after checking that every value is finite, a chunk at a time.

        `copy_to` receives exactly the bytes that were checked and hashed, whatever happens to the file meanwhile.
        """
        if copy_to is not None:
            copy_to.write(self._head)
        scratch = bytearray(CHUNK_BYTES)
        for entry in self.entries:
            for offset in range(entry.begin, entry.end, CHUNK_BYTES):
                chunk = memoryview(scratch)[: min(CHUNK_BYTES, entry.end - offset)]
                self._read_into(chunk, entry.name)
                self._require_finite(torch.frombuffer(chunk, dtype=entry.dtype), entry.name)
                if copy_to is not None:
                    copy_to.write(chunk)
        return self._hash.hexdigest()

    @property
    def head(self) -> bytes:
        """The bytes before the first tensor."""
        return self._head

    def _read_head(self) -> bytes:
        self.num_bytes = os.fstat(self._file.fileno()).st_size
        start = self._file.read(LENGTH_BYTES + 1)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        # Every header is a JSON object; a pickle or a zip archive fails here.
        if start[LENGTH_BYTES:] != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
            raise self.invalid("is not a safetensors file")
        head = start + self._file.read(length - 1)
        if len(head) < LENGTH_BYTES + length:
            raise self.invalid(f"is truncated: the header alone is {length} bytes, the file has {self.num_bytes}")
        return head

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.invalid(f"is not a safetensors file: its header is not valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise self.invalid("is not a safetensors file: its header is not a JSON object")
        return header

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise self.invalid("is not a safetensors file: its metadata is not a map of texts")
        return value

    def _entry(self, name: str, value: Any) -> TensorEntry:
        match value:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
                if dtype not in DTYPES:
                    raise self.invalid(f"tensor {name!r} has the unknown dtype {dtype!r}")
                numbers = (*shape, begin, end)
                if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
                    raise self.invalid(f"tensor {name!r} has the shape {shape} at {begin}..{end}")
                if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise self.invalid(f"tensor {name!r} has {end - begin} bytes, which {dtype} {shape} does not fill")
                return TensorEntry(name, DTYPES[dtype], tuple(shape), begin, end)
        raise self.invalid(f"tensor {name!r} is not described by dtype, shape and data_offsets")

    def _require_tiling(self) -> None:
        end = 0
        for entry in self.entries:
            if entry.begin != end:
                raise self.invalid(f"tensor {entry.name!r} begins at byte {entry.begin}, not at {end}")
            end = entry.end
        promised = len(self._head) + end
        if promised > self.num_bytes:
            raise self.invalid(f"is truncated: the header promises {promised} bytes, the file has {self.num_bytes}")
        if promised < self.num_bytes:
            raise self.invalid(f"has {self.num_bytes - promised} bytes after its last tensor")

    def _read_into(self, target: memoryview, name: str) -> None:
        if self._file.readinto(target) != len(target):
            raise self.invalid(f"is truncated: it shrank while tensor {name!r} was read")
        self._hash.update(target)

    def _require_finite(self, values: Tensor, name: str) -> None:
        if values.is_floating_point() and not is_finite(values):
            raise self.invalid(f"tensor {name!r} holds a value that is not finite")


def is_finite(values: Tensor) -> bool:
    """Whether every value is finite; least and greatest tell, and NaN is both where there is one."""
    least, greatest = torch.aminmax(values)
    return math.isfinite(least.item()) and math.isfinite(greatest.item())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key is an error: two readers could take two different ones."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} appears twice")
    return unique
