"""Reads registered stack files again and again, as fast as they come. Knows bytes and digests, not their meaning.

The first time all bytes are hashed while they are read. Later a file is trusted as long as it is the same one by the
numbers that the system keeps of it; one that was written to, or is another, must have the digest again.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stack_store.errors import DigestMismatch, StackInvalid
from stack_store.format import OpenStack, StackHeader, Window

Bytes = NDArray[np.uint8]
# Device, inode, size, and when content and inode last changed: what no write, no rename and no copy leaves alike.
Identity = tuple[int, int, int, int, int]

SCRATCH_UNIT = 64  # bytes that a view of any type divides


class WindowTaker(Protocol):
    """Makes something of a file's tensors."""

    def take(self, window: Window, data: Bytes) -> None:
        """The bytes of one window, which are the taker's for the length of the call."""
        ...


T = TypeVar("T", bound=WindowTaker)


@dataclass(frozen=True, slots=True)
class StackPlan:
    """What is known of a file whose header was read and found good."""

    header: StackHeader
    windows: tuple[Window, ...]
    identity: Identity


class StackFiles:
    """The files that were read before. Thread-safe."""

    def __init__(self) -> None:
        self._plans: dict[str, StackPlan] = {}
        self._scratch = threading.local()

    def read(self, path: Path, digest: str, begin: Callable[[StackHeader], T]) -> T:
        """Passes the file's tensors on, window by window, to what `begin` makes of the header and this returns.

        The bytes of a window are overwritten by the next.
        Raises StackInvalid, DigestMismatch or OSError that names the path.
        """
        with path.open("rb", buffering=0) as file:
            identity = _identity(file.fileno())
            known = self._plans.get(digest)
            if known is not None and known.identity == identity:
                taker = self._read_windows(file, path, known, begin, hashed=None)
                if _identity(file.fileno()) == identity:
                    return taker
            return self._read_and_hash(file, path, digest, begin)

    def _read_and_hash(self, file: FileIO, path: Path, digest: str, begin: Callable[[StackHeader], T]) -> T:
        """What is hashed is what is passed on, whatever becomes of the file meanwhile."""
        identity = _identity(file.fileno())
        with open(os.dup(file.fileno()), "rb") as copy:
            copy.seek(0)
            stack = OpenStack(copy, name=str(path))
        plan = StackPlan(stack.header, stack.windows(), identity)
        hashed = hashlib.sha256(stack.head)
        taker = self._read_windows(file, path, plan, begin, hashed=hashed)
        if hashed.hexdigest() != digest:
            raise DigestMismatch(f"{path} has digest {hashed.hexdigest()}, not {digest}")
        if _identity(file.fileno()) == identity:  # else it was replaced, and the next read looks for itself
            self._plans[digest] = plan
        return taker

    def _read_windows(
        self, file: FileIO, path: Path, plan: StackPlan, begin: Callable[[StackHeader], T], *, hashed: Any
    ) -> T:
        taker = begin(plan.header)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # the disk reads on while a window is unpacked
        for window in plan.windows:
            data = self._scratch_of(window.num_bytes)
            if not _fill(data, file.fileno(), window.begin):
                raise StackInvalid(f"{path}: is truncated: it shrank while it was read")
            if hashed is not None:
                hashed.update(data)
            taker.take(window, data)
        return taker

    def forget(self, digest: str) -> None:
        """The next read hashes all bytes again."""
        self._plans.pop(digest, None)

    def _scratch_of(self, num_bytes: int) -> Bytes:
        """Memory of the thread's own, as long as the longest window so far."""
        scratch: Bytes | None = getattr(self._scratch, "bytes", None)
        if scratch is None or len(scratch) < num_bytes:
            scratch = self._scratch.bytes = np.empty(-(-num_bytes // SCRATCH_UNIT) * SCRATCH_UNIT, np.uint8)
        return scratch[:num_bytes]


def _fill(data: Bytes, descriptor: int, begin: int) -> bool:
    """Whether the file had so many bytes from there on; one call reads at most two GiB."""
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:].data], begin + done)
        if count == 0:
            return False
        done += count
    return True


def _identity(descriptor: int) -> Identity:
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
