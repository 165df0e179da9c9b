"""Downloads on the event loop: one for each digest, and what happens to those who wait for it."""

import asyncio
import hashlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from server.admin_schemas import FileSource
from server.downloads import Downloads
from server.metrics import ServerMetrics
from server.sources import Sources
from stack_store.downloads import Downloader
from stack_store.errors import ObjectNotFound
from stack_store.object_storage import ObjectStorage
from stack_store.object_url import ObjectUrl
from stack_store.uploads import BlobStore
from tests.servers import WAIT_SECONDS, make_store

DIGEST = hashlib.sha256(b"law").hexdigest()


class GatedDownloader(Downloader):
    """Pretends to download as soon as it may; what is asked for at `absent` is not there."""

    def __init__(self, storage: ObjectStorage, uploads: BlobStore, folder: Path) -> None:
        super().__init__(storage, uploads, ServerMetrics(version="0", base="tiny"))
        self.folder = folder
        self.asked: list[str] = []
        self.may_end = threading.Event()

    def download(self, url: ObjectUrl, sha256: str) -> None:
        self.asked.append(url.text)
        assert self.may_end.wait(WAIT_SECONDS)
        if url.relative == "absent":
            raise ObjectNotFound(f"there is no object {url}")
        (self.folder / sha256).write_bytes(b"law")


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Downloads, GatedDownloader]:
    (tmp_path / "uploads").mkdir()
    uploads = BlobStore(tmp_path / "uploads", max_bytes=100)
    storage = ObjectStorage(["memory://x"], {})
    sources = Sources(make_store(tmp_path / "store", tmp_path / "import"), uploads, import_root=None)
    downloader = GatedDownloader(storage, uploads, tmp_path / "uploads")
    return Downloads(storage, downloader, sources), downloader


def fetch(downloads: Downloads, name: str) -> Coroutine[Any, Any, None]:
    return downloads.fetch([FileSource(url=f"memory://x/{name}", sha256=DIGEST)])


async def all_asked(downloads: Downloads, downloader: GatedDownloader, *names: str) -> list[BaseException | None]:
    """What came of calls of which each had begun to wait before the first download ended."""
    calls = []
    for name in names:
        calls.append(asyncio.create_task(fetch(downloads, name)))
        for _ in range(200):  # turns of the loop, within which a call looks for the file in a thread
            await asyncio.sleep(0.0005)
    downloader.may_end.set()
    return await asyncio.gather(*calls, return_exceptions=True)


def test_simultaneous_calls_download_once(parts: tuple[Downloads, GatedDownloader]) -> None:
    downloads, downloader = parts
    assert asyncio.run(all_asked(downloads, downloader, "law", "law", "law")) == [None] * 3
    assert downloader.asked == ["memory://x/law"]
    downloads.close()


def test_simultaneous_calls_for_one_place_fail_together(parts: tuple[Downloads, GatedDownloader]) -> None:
    downloads, downloader = parts
    came = asyncio.run(all_asked(downloads, downloader, "absent", "absent"))
    assert [type(error) for error in came] == [ObjectNotFound, ObjectNotFound]
    assert downloader.asked == ["memory://x/absent"]
    downloads.close()


def test_who_knows_another_place_goes_there_when_the_first_fails(parts: tuple[Downloads, GatedDownloader]) -> None:
    downloads, downloader = parts
    came = asyncio.run(all_asked(downloads, downloader, "absent", "law"))
    assert (type(came[0]), came[1]) == (ObjectNotFound, None)
    assert downloader.asked == ["memory://x/absent", "memory://x/law"]
    downloads.close()


def test_who_leaves_does_not_end_the_download_for_others(parts: tuple[Downloads, GatedDownloader]) -> None:
    downloads, downloader = parts

    async def leave_and_stay() -> None:
        leaver, stayer = (asyncio.create_task(fetch(downloads, "law")) for _ in range(2))
        while not downloader.asked:
            await asyncio.sleep(0.0005)
        leaver.cancel()
        downloader.may_end.set()
        await stayer

    asyncio.run(leave_and_stay())
    assert downloader.asked == ["memory://x/law"]
    downloads.close()
