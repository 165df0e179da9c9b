"""Host memory from which copies to a CUDA device are fastest. Knows bytes and pages, not stacks.

PyTorch's own pinned memory comes in powers of two and is never given back; a budget of bytes needs the exact size, and
memory that is free when its tensor is gone.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


def allocate_host(numel: int, dtype: torch.dtype) -> Tensor:
    """Flat memory that the system may page out. Raises MemoryError."""
    try:
        return torch.empty(numel, dtype=dtype)
    except RuntimeError as error:  # PyTorch's name for it on a CPU
        raise MemoryError(f"no host memory for {numel * dtype.itemsize} bytes") from error


def allocate_pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Flat memory that stays where it is, for the life of the tensor and its views. Raises MemoryError."""
    num_bytes = numel * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no host memory for {num_bytes} bytes") from error
    tensor = torch.from_numpy(np.frombuffer(pages, np.uint8))
    address, cuda = tensor.data_ptr(), _cuda_runtime()
    status = cuda.cudaHostRegister(address, num_bytes, 0)
    if int(status) != 0:
        raise MemoryError(f"{num_bytes} bytes of host memory cannot be pinned: {status}")
    # Called before the pages are given back, because the pages are what it watches.
    weakref.finalize(pages, cuda.cudaHostUnregister, address)
    return tensor.view(dtype)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
