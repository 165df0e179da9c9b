"""Fetches the objects that admin calls name before anything is changed. Lives on the event loop; knows no drivers."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from server.admin_schemas import FileSource
from server.errors import ObjectStorageDisabled
from server.sources import Sources
from stack_store.downloads import Downloader
from stack_store.object_storage import ObjectStorage
from stack_store.object_url import ObjectUrl

NUM_THREADS = 2  # of their own: a long download must not take a thread from what requests wait for


class Downloads:
    """One download for each digest, however many ask for it."""

    def __init__(self, storage: ObjectStorage, downloader: Downloader, sources: Sources) -> None:
        self._storage = storage
        self._downloader = downloader
        self._sources = sources
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="download")
        self._running: dict[str, tuple[ObjectUrl, asyncio.Future[None]]] = {}

    async def fetch(self, sources: Sequence[FileSource]) -> None:
        """Every source that has a URL can be opened by its digest afterwards. All URLs are checked before any is read.

        Raises ObjectStorageDisabled, ObjectRefused, and what Downloader.download raises.
        """
        wanted = [(self._check(source.url), source.sha256) for source in sources if source.url is not None]
        for url, sha256 in wanted:
            assert sha256 is not None
            await self._fetch(url, sha256)

    def close(self) -> None:
        """Ends what runs; what came of it is kept for the next start."""
        self._downloader.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, url: str) -> ObjectUrl:
        if not self._storage.has_roots:
            raise ObjectStorageDisabled("store.object_roots is not set, so nothing is fetched by url", param="url")
        return self._storage.check(url)

    async def _fetch(self, url: ObjectUrl, sha256: str) -> None:
        while not await asyncio.to_thread(self._sources.has, sha256):
            running_url, running = self._running.get(sha256) or self._start(url, sha256)
            if running_url == url:
                await asyncio.shield(running)  # who leaves does not end it for the others
                return
            await asyncio.wait([running])  # of another place: if it fails, ours may still have it

    def _start(self, url: ObjectUrl, sha256: str) -> tuple[ObjectUrl, asyncio.Future[None]]:
        work = self._threads.submit(copy_context().run, self._downloader.download, url, sha256)
        running = asyncio.wrap_future(work)
        running.add_done_callback(lambda _: self._running.pop(sha256))
        self._running[sha256] = url, running
        return url, running
