"""Finds the files that admin calls name: uploads by digest, imports by path. Knows places, not contents."""

import hashlib
from contextlib import ExitStack
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

    def open(self, source: FileSource, opened: ExitStack) -> Path | BufferedReader:
        """A file that stays what it is while it is read. An import is open until `opened` closes."""
        if source.sha256 is None:
            return opened.enter_context(self._open_import(source))
        try:
            return self.uploads.blob_path(source.sha256)
        except UploadNotFound:  # an upload is removed once it is registered; the same call again must still succeed
            for domain in self._registry.manifest.domains:
                for stack in domain.stacks:
                    if stack.digest == source.sha256:
                        return self._registry.stack_path(stack)
            raise

    def adopt(self, source: FileSource) -> str:
        """The digest of an upload; an import becomes one, so that what is checked first is what is used later."""
        if source.sha256 is not None:
            return source.sha256
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
