"""Finds the files that admin calls name: by path, or by the digest of what was up- or downloaded. Knows no contents."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

from server.admin_schemas import FileSource
from server.errors import ImportDisabled
from stack_store.errors import UploadNotFound
from stack_store.import_path import open_import
from stack_store.registry import StackRegistry
from stack_store.uploads import BlobStore

logger = logging.getLogger(__name__)

COPY_BYTES = 1024 * 1024


class Sources:
    """Blocks on files, so it is used off the event loop."""

    def __init__(self, registry: StackRegistry, uploads: BlobStore, *, import_root: Path | None) -> None:
        self.uploads = uploads
        self._registry = registry
        self._import_root = import_root

    def has(self, sha256: str) -> bool:
        """Whether a file of this digest is among the uploads, or the store uses it. Reads all of it."""
        return self._find(sha256) is not None

    def open(self, source: FileSource, opened: ExitStack) -> BufferedReader:
        """A file that stays what it is while it is read, open until `opened` closes. Its name is the caller's own."""
        if source.sha256 is None:
            return opened.enter_context(self._open_import(source))
        path = self._require(source.sha256)
        return opened.enter_context(open(source.sha256, "rb", opener=lambda _, flags: os.open(path, flags)))

    @contextmanager
    def router_file(self, source: FileSource) -> Iterator[Path]:
        """A file that stays what it is, so that what is checked first is what is used later.

        An import is copied among the uploads, where it lies until the block ends.
        """
        if source.sha256 is not None:
            yield self._require(source.sha256)
            return
        digest = self._adopt(source)
        try:
            yield self.uploads.blob_path(digest)
        finally:
            self.uploads.remove(digest)

    def _require(self, sha256: str) -> Path:
        if (path := self._find(sha256)) is None:
            raise UploadNotFound(f"no upload has the digest {sha256}")
        return path

    def _find(self, sha256: str) -> Path | None:
        """An upload is removed once it is registered; the same call again must still succeed.

        Hashed, because a file that was damaged where it lies must not be registered as another.
        """
        if self.uploads.has(sha256):
            path = self.uploads.blob_path(sha256)
            if _digest(path) == sha256:
                return path
            logger.warning("damaged upload removed sha256=%s", sha256)
            self.uploads.remove(sha256)
        stored = (self._registered_stack(sha256), self._registered_router(sha256))
        return next((path for path in stored if path is not None and _digest(path) == sha256), None)

    def _registered_stack(self, sha256: str) -> Path | None:
        for domain in self._registry.manifest.domains:
            for stack in domain.stacks:
                if stack.digest == sha256:
                    return self._registry.stack_path(stack)
        return None

    def _registered_router(self, sha256: str) -> Path | None:
        router = self._registry.manifest.router
        return None if router is None or router.digest != sha256 else self._registry.path / router.file

    def _adopt(self, source: FileSource) -> str:
        with self._open_import(source) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with self.uploads.receive(digest) as writer:
                while chunk := file.read(COPY_BYTES):
                    writer.write(chunk)
                writer.commit()
        return digest

    def forget(self, source: FileSource) -> None:
        """Removes an upload that has served."""
        if source.sha256 is not None:
            self.uploads.remove(source.sha256)

    def _open_import(self, source: FileSource) -> BufferedReader:
        assert source.path is not None
        if self._import_root is None:
            raise ImportDisabled("store.import_root is not set, so files can only be uploaded", param="path")
        return open_import(self._import_root, source.path)


def _digest(path: Path) -> str | None:
    """None if there is no file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
