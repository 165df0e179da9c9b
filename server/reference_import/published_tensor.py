"""Decides which values of an archive are tensors that can be imported. Knows one tensor at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.errors import ReferenceRefused
from stack_store.tensor_file import is_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_tensor(file: str, key: str, value: object) -> Tensor:
    """The value, if it is a dense float32, float16 or bfloat16 tensor on the CPU. ReferenceRefused names the fault."""
    if not isinstance(value, Tensor):
        raise ReferenceRefused(f"{file}: {key!r} is a {type(value).__name__}, must be a tensor")
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        layout = "nested" if value.is_nested else value.layout
        raise ReferenceRefused(f"{file}: tensor {key!r} is {layout} on {value.device}, must be dense, on the CPU")
    if value.dtype not in DTYPES:
        raise ReferenceRefused(f"{file}: tensor {key!r} is {value.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    num_stored = value.untyped_storage().nbytes() // value.itemsize
    if value.numel() > num_stored:  # or a small file could ask for more memory than there is
        raise ReferenceRefused(f"{file}: tensor {key!r} promises {value.numel()} values, its storage has {num_stored}")
    return value.detach()


def require_shape(file: str, key: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """ReferenceRefused, with both shapes, for another shape."""
    if list(tensor.shape) != list(shape):
        raise ReferenceRefused(f"{file}: tensor {key!r} has shape {list(tensor.shape)}, must be {list(shape)}")


def finite_in(dtype: torch.dtype, file: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor in dtype. ReferenceRefused if a value is not finite there: a large float32 does not fit bfloat16."""
    converted = tensor.to(dtype)
    if not is_finite(converted):
        raise ReferenceRefused(f"{file}: tensor {key!r} holds a value that is not finite in {dtype}")
    return converted
