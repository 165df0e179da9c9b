"""The folder in which an import works. Knows names and locks, not what is put there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from stack_store.locks import FolderShare, exclusive_folder

PREFIX = ".brainstacks-import-"


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` that vanishes with the block; imports that were killed left theirs, which vanish first.

    Raises OSError.
    """
    with exclusive_folder(parent):  # so that none is taken for left behind before its import holds it
        for left in parent.glob(f"{PREFIX}*"):
            with suppress(OSError):  # another user's, or no folder
                FolderShare(left, when_alone=partial(shutil.rmtree, left)).close()
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        share = FolderShare(path, when_alone=lambda: None)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        share.close()
