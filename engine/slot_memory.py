"""The memory of slots: flat, exact, and used again. Knows bytes and pages, not stacks.

New pages cost more than what is put into them: the system zeroes each, and to pin them for CUDA holds up whatever the
device is about to do. So the pages of a slot that came free serve the next load of their size.
"""

import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pin = Callable[[int, int], None]  # (address, bytes)
Unpin = Callable[[int], None]  # (address)

MAX_FREE_SLOTS = 2  # as many as load at once; what else comes free goes back to the system


class SlotMemory:
    """Gives flat memory for the life of each tensor and its views. Thread-safe."""

    def __init__(self, *, pin: Pin | None = None, unpin: Unpin | None = None, max_free: int = MAX_FREE_SLOTS) -> None:
        """`pin` is called for new pages, `unpin` before they go back."""
        self._pin = pin
        self._unpin = unpin
        self._max_free = max_free
        self._free: list[mmap.mmap] = []
        self._lock = threading.RLock()  # what the lock's holder allocates may let a dead slot be collected

    @classmethod
    def for_copies_to(cls, device: torch.device) -> "SlotMemory":
        """Pinned if the device is CUDA."""
        return cls(pin=_cuda_pin, unpin=_cuda_unpin) if device.type == "cuda" else cls()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Whatever lay there before. Raises MemoryError."""
        num_bytes = numel * dtype.itemsize
        pages = self._take(num_bytes) or self._make(num_bytes)
        view = np.frombuffer(pages, np.uint8)
        # Called when neither the tensor nor a view of it needs the pages any more.
        weakref.finalize(view, self._give_back, pages).atexit = False
        return torch.from_numpy(view).view(dtype)

    def __del__(self) -> None:
        self.release()  # else they would be unmapped while they are pinned, and no page could be pinned there again

    def release(self) -> None:
        """Gives free pages back to the system."""
        with self._lock:
            free, self._free = self._free, []
        for pages in free:
            self._close(pages)

    def _take(self, num_bytes: int) -> mmap.mmap | None:
        with self._lock:
            for number, pages in enumerate(self._free):
                if len(pages) == num_bytes:
                    return self._free.pop(number)
        return None

    def _make(self, num_bytes: int) -> mmap.mmap:
        self.release()  # pages of another size, which would come on top
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no memory for {num_bytes} bytes") from error
        with suppress(OSError):  # a kernel may be built without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # zeroed and looked up in larger pieces
        if self._pin is not None:
            self._pin(_address(pages), num_bytes)
        return pages

    def _give_back(self, pages: mmap.mmap) -> None:
        with self._lock:
            if len(self._free) < self._max_free:
                self._free.append(pages)
                return
        self._close(pages)

    def _close(self, pages: mmap.mmap) -> None:
        if self._unpin is not None:
            self._unpin(_address(pages))
        del pages  # unmapped when its last view, which may be the one that is going, is gone


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


def _cuda_pin(address: int, num_bytes: int) -> None:
    status = _cuda_runtime().cudaHostRegister(address, num_bytes, 0)
    if int(status) != 0:
        raise MemoryError(f"{num_bytes} bytes of host memory cannot be pinned: CUDA error {int(status)}")


def _cuda_unpin(address: int) -> None:
    _cuda_runtime().cudaHostUnregister(address)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
