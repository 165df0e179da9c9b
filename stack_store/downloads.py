"""Brings objects among the uploads, piece by piece and from where the last attempt ended. Knows no HTTP, no stacks."""

import logging
import threading
import time
from typing import Protocol

from stack_store.errors import DigestMismatch, DownloadStopped, ObjectUnavailable, StoreError, UploadTooLarge
from stack_store.object_storage import ObjectStorage
from stack_store.object_url import ObjectUrl
from stack_store.partial_file import PartialFile
from stack_store.uploads import BlobStore

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 1024 * 1024
MIN_CHUNK_BYTES = 64 * 1024
BACKOFF_SECONDS = (0.5, 1.0, 2.0)


class DownloadObserver(Protocol):
    """Hears of every piece, and of every call that failed for good."""

    def downloaded(self, num_bytes: int) -> None: ...

    def download_failed(self) -> None: ...


class Downloader:
    """Thread-safe, and blocks its caller. Of several that want one digest, also in other processes, one downloads."""

    def __init__(
        self,
        storage: ObjectStorage,
        uploads: BlobStore,
        observer: DownloadObserver,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        backoff_seconds: tuple[float, ...] = BACKOFF_SECONDS,
    ) -> None:
        """A break is followed by the next attempt after as many seconds, counted anew when bytes came."""
        self._storage = storage
        self._uploads = uploads
        self._observer = observer
        self._chunk_bytes = chunk_bytes
        self._backoff_seconds = backoff_seconds
        self._stopping = threading.Event()

    def download(self, url: ObjectUrl, sha256: str) -> None:
        """The upload `sha256` is there afterwards.

        Raises ObjectNotFound, ObjectDenied, or ObjectUnavailable when the last attempt broke off; UploadTooLarge;
        DigestMismatch, and OSError if the disk takes no more, both forgetting what came; DownloadStopped after stop().
        """
        try:
            with self._uploads.resume(sha256, wait=self._wait) as partial:
                if self._uploads.has(sha256):  # another brought it while this one waited
                    partial.discard()
                else:
                    self._fetch(url, sha256, partial)
        except (StoreError, OSError):
            self._observer.download_failed()
            raise

    def stop(self) -> None:
        """Ends every download after the piece that it reads. What came is kept."""
        self._stopping.set()

    def _fetch(self, url: ObjectUrl, sha256: str, partial: PartialFile) -> None:
        began, num_kept = time.monotonic(), partial.num_bytes
        self._receive_despite_breaks(url, partial)
        num_bytes = partial.num_bytes
        try:
            self._uploads.complete(partial, sha256)
        except DigestMismatch as error:
            hint = "; its beginning was of an earlier attempt, so another may succeed" if num_kept else ""
            raise DigestMismatch(f"object {url}: {error}{hint}") from error
        logger.info(
            "object downloaded url=%s sha256=%s bytes=%d of_earlier_attempts=%d seconds=%.3f",
            url,
            sha256,
            num_bytes,
            num_kept,
            time.monotonic() - began,
        )

    def _receive_despite_breaks(self, url: ObjectUrl, partial: PartialFile) -> None:
        num_breaks = 0
        while True:
            before = partial.num_bytes
            # Smaller pieces after a break: a link that always fails after a while must still get something through.
            chunk_bytes = max(min(self._chunk_bytes, MIN_CHUNK_BYTES), self._chunk_bytes >> (2 * num_breaks))
            try:
                self._receive(url, partial, chunk_bytes=chunk_bytes)
                return
            except ObjectUnavailable as error:
                num_breaks = 1 if partial.num_bytes > before else num_breaks + 1
                if num_breaks > len(self._backoff_seconds):
                    raise
                logger.warning("download broke off bytes=%d reason=%r", partial.num_bytes, str(error))
            self._wait(self._backoff_seconds[num_breaks - 1])

    def _receive(self, url: ObjectUrl, partial: PartialFile, *, chunk_bytes: int) -> None:
        with self._storage.open(url) as found:
            if found.num_bytes > self._uploads.max_bytes:
                partial.discard()
                limit = self._uploads.max_bytes
                raise UploadTooLarge(f"object {url} has {found.num_bytes} bytes, at most {limit} are allowed")
            if partial.num_bytes > found.num_bytes:
                partial.restart()
            while (start := partial.num_bytes) < found.num_bytes:
                self._wait(0)
                chunk = found.read(start, min(start + chunk_bytes, found.num_bytes))
                partial.append(chunk)
                self._observer.downloaded(len(chunk))

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise DownloadStopped("the server is shutting down; the next attempt goes on from here")
