"""Makes files appear whole and durably, or not at all. Knows the file system, not what the files mean."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


class StagedFile:
    """A file in the making. Its bytes become `path` by commit(path), or vanish by discard()."""

    def __init__(self, folder: Path) -> None:
        """`folder` must lie on the file system of the path that is committed to."""
        self._temporary = folder / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        self.file: BufferedWriter = self._temporary.open("xb")

    def commit(self, path: Path) -> None:
        """The bytes bear the name `path`, and both survive a power cut."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        # Renamed last, so a reader sees the old file or the new, never half.
        os.replace(self._temporary, path)
        flush_folder(path.parent)

    def discard(self) -> None:
        """Removes the bytes, unless they were committed. Idempotent."""
        with suppress(OSError):  # a full disk cannot take what is still buffered, and nobody wants it any more
            self.file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def staged_file(folder: Path) -> Iterator[StagedFile]:
    """A staged file that vanishes with the block unless it is committed in it."""
    staged = StagedFile(folder)
    try:
        yield staged
    finally:
        staged.discard()


@contextmanager
def replace_file(path: Path) -> Iterator[BufferedWriter]:
    """Yields a new file that takes the name `path` when the block ends well, and vanishes when it does not."""
    with staged_file(path.parent) as staged:
        yield staged.file
        staged.commit(path)


def make_folder(path: Path) -> None:
    """The folder exists afterwards, and its name survives a power cut."""
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """The names in the folder are on the disk: without this, a power cut can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
