"""Host memory from which copies to a CUDA device are fastest. Knows bytes and pages, not stacks.

PyTorch's own pinned memory comes in powers of two and is never given back; a budget of bytes needs the exact size. To
pin and unpin pages holds up whatever the device is about to do, so free pages serve the next load of their size.
"""

import mmap
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pin = Callable[[int, int], None]  # (address, bytes)


def allocate_host(numel: int, dtype: torch.dtype) -> Tensor:
    """Flat memory that the system may page out. Raises MemoryError."""
    try:
        return torch.empty(numel, dtype=dtype)
    except RuntimeError as error:  # PyTorch's name for it on a CPU
        raise MemoryError(f"no host memory for {numel * dtype.itemsize} bytes") from error


class PinnedMemory:
    """Flat pinned memory for the life of each tensor and its views. Thread-safe.

    Free pages of one size are kept until memory of another size is wanted, so what lies here is never more than what is
    in use and what was given back since.
    """

    def __init__(self, *, pin: Pin | None = None, unpin: Callable[[int], None] | None = None) -> None:
        """By default CUDA's own way."""
        self._pin = pin or _cuda_pin
        self._unpin = unpin or _cuda_unpin
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Raises MemoryError."""
        num_bytes = numel * dtype.itemsize
        pages = self._take(num_bytes) or self._make(num_bytes)
        view = np.frombuffer(pages, np.uint8)
        # Called when neither the tensor nor a view of it needs the pages any more.
        weakref.finalize(view, self._give_back, pages).atexit = False
        return torch.from_numpy(view).view(dtype)

    def release(self) -> None:
        """Gives free pages back to the system."""
        with self._lock:
            free, self._free = self._free, []
        for pages in free:
            self._unpin(_address(pages))
            pages.close()

    def _take(self, num_bytes: int) -> mmap.mmap | None:
        with self._lock:
            for number, pages in enumerate(self._free):
                if len(pages) == num_bytes:
                    return self._free.pop(number)
        return None

    def _make(self, num_bytes: int) -> mmap.mmap:
        self.release()
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no host memory for {num_bytes} bytes") from error
        self._pin(_address(pages), num_bytes)
        return pages

    def _give_back(self, pages: mmap.mmap) -> None:
        with self._lock:
            self._free.append(pages)


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


def _cuda_pin(address: int, num_bytes: int) -> None:
    status = _cuda_runtime().cudaHostRegister(address, num_bytes, 0)
    if int(status) != 0:
        raise MemoryError(f"{num_bytes} bytes of host memory cannot be pinned: {status}")


def _cuda_unpin(address: int) -> None:
    _cuda_runtime().cudaHostUnregister(address)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
