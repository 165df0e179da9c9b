"""Finds the files that admin calls name: by path, or by the digest of what was up- or downloaded. Knows no contents."""

import hashlib
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

COPY_BYTES = 1024 * 1024


class Sources:
    """Blocks on files, so it is used off the event loop."""

    def __init__(self, registry: StackRegistry, uploads: BlobStore, *, import_root: Path | None) -> None:
        self.uploads = uploads
        self._registry = registry
        self._import_root = import_root

    def has(self, sha256: str) -> bool:
        """Whether a file of this digest is among the uploads, or the store uses it."""
        stored = (self._registered_stack(sha256), self._registered_router(sha256))
        return self.uploads.has(sha256) or any(path is not None and path.is_file() for path in stored)

    def open(self, source: FileSource, opened: ExitStack) -> BufferedReader:
        """A file that stays what it is while it is read, open until `opened` closes. Its name is the caller's own."""
        if source.sha256 is None:
            return opened.enter_context(self._open_import(source))
        path = self._stack_path(source.sha256)
        return opened.enter_context(open(source.sha256, "rb", opener=lambda _, flags: os.open(path, flags)))

    def _stack_path(self, sha256: str) -> Path:
        try:
            return self.uploads.blob_path(sha256)
        except UploadNotFound:  # an upload is removed once it is registered; the same call again must still succeed
            path = self._registered_stack(sha256)
            if path is None:
                raise
            return path

    @contextmanager
    def router_file(self, source: FileSource) -> Iterator[Path]:
        """A file that stays what it is, so that what is checked first is what is used later.

        An import is copied among the uploads, where it lies until the block ends.
        """
        if source.sha256 is not None:
            yield self._uploaded_router(source.sha256)
            return
        digest = self._adopt(source)
        try:
            yield self.uploads.blob_path(digest)
        finally:
            self.uploads.remove(digest)

    def _uploaded_router(self, sha256: str) -> Path:
        try:
            return self.uploads.blob_path(sha256)
        except UploadNotFound:  # as for stacks: the same call again must still succeed
            path = self._registered_router(sha256)
            if path is None:
                raise
            return path

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
