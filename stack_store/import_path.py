"""Lets an administrator name files under one folder, and none outside it. Knows paths, not stacks."""

import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath

from stack_store.errors import ImportRefused


def resolve_import(root: Path, relative: str) -> Path:
    """The regular file that `relative` names under `root`, free of links. Raises ImportRefused, naming the fault.

    What lies there can change before it is opened: use open_import where the answer must hold.
    """
    path = PurePosixPath(relative)
    if path.is_absolute():
        raise ImportRefused(f"path {relative!r} is absolute, must be relative to the import root")
    if ".." in path.parts:
        raise ImportRefused(f"path {relative!r} contains '..'")
    try:
        real_root = root.resolve(strict=True)
        real = (real_root / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ImportRefused(f"path {relative!r} can't be found under the import root") from error
    if not real.is_relative_to(real_root):
        raise ImportRefused(f"path {relative!r} leaves the import root through a symlink")
    if not real.is_file():
        raise ImportRefused(f"path {relative!r} is not a regular file")
    return real


def open_import(root: Path, relative: str) -> BufferedReader:
    """The file that resolve_import finds, opened. Its name is `relative`.

    It is reached from the root through real folders only: a folder or file that is swapped for a link after the check
    is refused, and what is swapped after this returns no longer matters.
    """
    real_root = root.resolve()
    parts = resolve_import(root, relative).relative_to(real_root).parts
    try:
        descriptor = _open_without_links(real_root, parts)
    except OSError as error:
        raise ImportRefused(f"path {relative!r} changed or can't be read: {error.strerror}") from error
    file = open(relative, "rb", opener=lambda *_: descriptor)  # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise ImportRefused(f"path {relative!r} is not a regular file")
    return file


def _open_without_links(root: Path, parts: tuple[str, ...]) -> int:
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Without O_NONBLOCK, a pipe in the file's place would hold us until somebody writes to it.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
