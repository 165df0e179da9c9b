"""Keeps what has come of a file so far, for whoever goes on with it. Knows bytes and their digest, not their source."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from stack_store.atomic import flush_folder
from stack_store.errors import DigestMismatch

PARTIAL_SUFFIX = ".part"
POLL_SECONDS = 0.1


class PartialFile:
    """A file that grows at its end and outlives its process. It has one holder at a time, of all threads and processes.

    A power cut may leave other bytes in it than were written; commit finds out.
    """

    def __init__(self, path: Path, *, wait: Callable[[float], None]) -> None:
        """Makes the file if it is missing. Calls `wait` with seconds for as long as another holds it."""
        self._path = path
        self._file = _open_alone(path, wait)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, chunk: bytes) -> None:
        """The bytes survive the end of this process. If the disk refuses them, all are given up: others need room."""
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self.restart()
            raise

    def restart(self) -> None:
        """Forgets every byte."""
        self._file.truncate(0)

    def commit(self, path: Path, *, digest: str) -> None:
        """The bytes bear the name `path`. Raises DigestMismatch, keeping nothing, unless they have this digest."""
        self._file.seek(0)
        found = hashlib.file_digest(self._file, "sha256").hexdigest()
        if found != digest:
            self.discard()
            raise DigestMismatch(f"what came has the digest {found}, not {digest}")
        os.fsync(self._file.fileno())
        os.replace(self._path, path)
        flush_folder(path.parent)

    def discard(self) -> None:
        """Removes the file. Only its holder may, and not after commit."""
        self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.num_bytes == 0 and _bears_name(self._file, self._path):
            self.discard()  # nothing to go on with
        self._file.close()  # and with it the lock


def _open_alone(path: Path, wait: Callable[[float], None]) -> FileIO:
    while True:
        with ExitStack() as cleanup:
            file = cleanup.enter_context(path.open("a+b", buffering=0))
            if _is_locked(file) and _bears_name(file, path):
                cleanup.pop_all()
                return file
        wait(POLL_SECONDS)


def _is_locked(file: FileIO) -> bool:
    """Whether it is now ours, until it is closed."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bears_name(file: FileIO, path: Path) -> bool:
    """Not after its last holder committed or removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
