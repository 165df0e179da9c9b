"""Keeps uploaded and downloaded files until they are registered. Knows bytes and their digests, not what they mean."""

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from stack_store.atomic import TEMPORARY_SUFFIX, StagedFile, make_folder
from stack_store.errors import DigestMismatch, UploadNotFound, UploadTooLarge
from stack_store.locks import FolderShare
from stack_store.manifest import DIGEST
from stack_store.partial_file import PARTIAL_SUFFIX, PartialFile

PARTIAL_KEPT_SECONDS = 7 * 24 * 3600


class BlobWriter:
    """One upload in progress; it vanishes with the block unless it is committed in it. For one thread at a time."""

    def __init__(self, path: Path, *, digest: str, max_bytes: int) -> None:
        self._path = path
        self._digest = digest
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._hash = hashlib.sha256()
        self._staged = StagedFile(path.parent)

    def write(self, chunk: bytes) -> None:
        """Raises UploadTooLarge at the first byte that is too many."""
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            self.abort()
            raise UploadTooLarge(f"upload {self._digest} has more than {self._max_bytes} bytes")
        self._hash.update(chunk)
        self._staged.file.write(chunk)

    def commit(self) -> Path:
        """The path of the whole upload. Raises DigestMismatch, keeping nothing, for other bytes than were promised."""
        if self._hash.hexdigest() != self._digest:
            self.abort()
            raise DigestMismatch(f"upload {self._digest} has the digest {self._hash.hexdigest()}")
        self._staged.commit(self._path)
        return self._path

    def abort(self) -> None:
        """Removes what came so far. Idempotent, and without effect after commit."""
        self._staged.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


class BlobStore:
    """Uploads by digest, each at most max_bytes long. Thread-safe."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Removes what interrupted uploads left, if no other process receives uploads there.

        What interrupted downloads left is kept for a week, because the next attempt goes on with it. A missing folder
        is made for the first file that comes, so that a store that nobody changes may be read-only.
        """
        self.max_bytes = max_bytes
        self._path = path
        self._joining = threading.Lock()
        self._share: FolderShare | None = None
        if path.is_dir():
            self._join()

    def receive(self, sha256: str) -> BlobWriter:
        blob = self._blob(sha256)
        self._join()
        return BlobWriter(blob, digest=sha256, max_bytes=self.max_bytes)

    def resume(self, sha256: str, *, wait: Callable[[float], None]) -> PartialFile:
        """What earlier downloads of this digest left, or nothing yet; `wait` as in PartialFile."""
        blob = self._blob(sha256)
        self._join()
        return PartialFile(blob.with_name(blob.name + PARTIAL_SUFFIX), wait=wait)

    def complete(self, partial: PartialFile, sha256: str) -> None:
        """The download is an upload now. Raises DigestMismatch, keeping nothing, for other bytes than were promised."""
        partial.commit(self._blob(sha256), digest=sha256)

    def has(self, sha256: str) -> bool:
        return self._blob(sha256).is_file()

    def blob_path(self, sha256: str) -> Path:
        """Raises UploadNotFound unless the whole upload is there."""
        if not self.has(sha256):
            raise UploadNotFound(f"no upload has the digest {sha256}")
        return self._blob(sha256)

    def remove(self, sha256: str) -> None:
        """Forgets an upload, if it is there: its stack was registered, or nobody wants it."""
        self._blob(sha256).unlink(missing_ok=True)

    def close(self) -> None:
        if self._share is not None:
            self._share.close()

    def _join(self) -> None:
        with self._joining:
            if self._share is None:
                make_folder(self._path)
                self._share = FolderShare(self._path, when_alone=self._remove_unfinished)

    def _blob(self, sha256: str) -> Path:
        # Also what keeps a name from leaving the folder.
        if not DIGEST.fullmatch(sha256):
            raise DigestMismatch(f"{sha256!r} is not a sha256 in lower-case hex")
        return self._path / sha256

    def _remove_unfinished(self) -> None:
        for path in self._path.glob(f".*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)
        for path in self._path.glob(f"*{PARTIAL_SUFFIX}"):
            if time.time() - path.stat().st_mtime > PARTIAL_KEPT_SECONDS:
                path.unlink(missing_ok=True)
