"""Opens the files of a published folder, and none outside it. Knows paths and torch archives, not what is in them."""

import hashlib
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

import torch

from server.errors import ReferenceRefused
from stack_store.errors import ImportRefused
from stack_store.import_path import open_import, resolve_import

# What torch.load and zipfile were seen to raise for damaged archives and for other files.
ARCHIVE_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True, slots=True)
class Archive:
    """What a torch archive holds: plain values and tensors on the CPU."""

    content: object
    digest: str  # sha256 of the file in hex


@dataclass(frozen=True, slots=True)
class PublishedFolder:
    """The folder that was published. Every path is relative to it, with '/' between the parts."""

    root: Path

    def find(self, what: str, candidates: Sequence[str]) -> str:
        """The first of the paths that exists. Raises ReferenceRefused if none does, or if it leads out of the folder.

        `what` names the file in the message.
        """
        for path in candidates:
            parts = PurePosixPath(path)
            # A path that points outside is refused even if nothing is there: it belongs in no manifest.
            if parts.is_absolute() or ".." in parts.parts or os.path.lexists(self.root / path):
                try:
                    resolve_import(self.root, path)
                except ImportRefused as error:
                    raise ReferenceRefused(f"{what}: {error}") from error
                return path
        raise ReferenceRefused(f"{what} is missing: {str(self.root)!r} has none of {list(candidates)}")

    def real_path(self, path: str) -> Path:
        """Where the file lies, free of links, so that one file under two names is known. Raises ImportRefused."""
        return resolve_import(self.root, path)

    def read_bytes(self, path: str) -> bytes:
        """All bytes of the file. Raises ImportRefused."""
        with open_import(self.root, path) as file:
            return file.read()

    def load(self, path: str) -> Archive:
        """The archive, read without running any code of its own (weights_only).

        Raises ReferenceRefused unless it is a sound archive of plain values and tensors, ImportRefused for a path
        outside.
        """
        with open_import(self.root, path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            try:
                _require_sound(path, file)
                file.seek(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of unusual pickles: what they hold is checked, value by value
                    return Archive(torch.load(file, map_location="cpu", weights_only=True), digest)
            except ARCHIVE_FAULTS as error:
                reason = str(error).strip().partition("\n")[0]
                raise ReferenceRefused(f"{path} is not a torch archive of plain tensors: {reason}") from error


def _require_sound(path: str, file: BufferedReader) -> None:
    """Torch reads an archive without looking at the checksums of its parts, and unfolds what no torch.save compressed.

    Raises ReferenceRefused for a part of other bytes than were written, and one of ARCHIVE_FAULTS.
    """
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{part.filename!r} is compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise ReferenceRefused(
            f"{path} is damaged: its part {damaged!r} does not have the checksum that it was written with"
        )
