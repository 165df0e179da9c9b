"""Keeps those who use one folder out of each other's way. Knows flock, not what the folder holds.

The kernel frees these locks when their process dies, however it dies, so none is ever left behind.
"""

import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive_folder(path: Path) -> Iterator[None]:
    """Within the block, nobody else is in such a block for this folder, no other process and no other thread."""
    descriptor = _open_folder(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class FolderShare:
    """A sign that somebody uses the folder, held until it is closed or its process dies."""

    def __init__(self, path: Path, *, when_alone: Callable[[], None]) -> None:
        """Calls `when_alone` first if nobody else has a share: what they left unfinished then belongs to nobody.

        Not in a folder that cannot be written, where it could remove nothing.
        """
        descriptor = _open_folder(path)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            if os.access(path, os.W_OK):
                when_alone()
        # From exclusive to shared there is an instant without a lock. Another newcomer may be alone in it; that harms
        # nobody, because a share that is not yet held has nothing unfinished.
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        self._close()


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
