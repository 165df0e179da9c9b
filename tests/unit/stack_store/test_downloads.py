"""Downloads: where the next attempt begins, when one is given up, and what is left on the disk."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stack_store.downloads import MIN_CHUNK_BYTES, Downloader
from stack_store.errors import (
    DigestMismatch,
    DownloadStopped,
    ObjectDenied,
    ObjectUnavailable,
    StoreError,
    UploadTooLarge,
)
from stack_store.object_storage import ObjectStorage, StoredObject
from stack_store.object_url import ObjectUrl
from stack_store.partial_file import PartialFile
from stack_store.uploads import PARTIAL_KEPT_SECONDS, BlobStore

CONTENT = bytes(range(256)) * 4
DIGEST = hashlib.sha256(CONTENT).hexdigest()
URL = ObjectUrl("memory://x/law", "memory://x/")
WAIT_SECONDS = 10.0


class ScriptedObject:
    """`content`; each read takes the next of `faults`, None being none."""

    def __init__(self, content: bytes, faults: list[StoreError | None]) -> None:
        self.content, self.faults = content, faults
        self.num_bytes = len(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, end: int) -> bytes:
        self.reads.append((start, end))
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        return self.content[start:end]


class OneObject(ObjectStorage):
    """Has the same object everywhere."""

    def __init__(self, content: bytes = CONTENT, faults: list[StoreError | None] | None = None) -> None:
        super().__init__([], {})
        self.object = ScriptedObject(content, faults or [])

    @contextmanager
    def open(self, url: ObjectUrl) -> Iterator[StoredObject]:
        yield self.object


class Counts:
    """What a download told."""

    def __init__(self) -> None:
        self.num_bytes, self.num_failures = 0, 0

    def downloaded(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def download_failed(self) -> None:
        self.num_failures += 1


def broken() -> ObjectUnavailable:
    return ObjectUnavailable("broke off")


def downloader(folder: Path, storage: OneObject, counts: Counts | None = None, *, max_bytes: int = 5000) -> Downloader:
    """Reads 256 bytes at a time and tries twice more."""
    uploads = BlobStore(folder, max_bytes=max_bytes)
    return Downloader(storage, uploads, counts or Counts(), chunk_bytes=256, backoff_seconds=(0.0, 0.0))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_object_is_read_in_pieces_and_kept(tmp_path: Path) -> None:
    storage, counts = OneObject(), Counts()
    downloader(tmp_path, storage, counts).download(URL, DIGEST)
    assert storage.object.reads == [(0, 256), (256, 512), (512, 768), (768, 1024)]
    assert (tmp_path / DIGEST).read_bytes() == CONTENT
    assert left_in(tmp_path) == [DIGEST]
    assert (counts.num_bytes, counts.num_failures) == (1024, 0)


def test_a_break_is_followed_by_the_rest(tmp_path: Path) -> None:
    storage = OneObject(faults=[None, broken(), broken(), None, broken(), broken()])
    downloader(tmp_path, storage).download(URL, DIGEST)
    assert [start for start, _ in storage.object.reads] == [0, 256, 256, 256, 512, 512, 512, 768]
    assert left_in(tmp_path) == [DIGEST]


def test_attempts_are_bounded_and_the_next_call_goes_on(tmp_path: Path) -> None:
    storage, counts = OneObject(faults=[None, broken(), broken(), broken()]), Counts()
    with pytest.raises(ObjectUnavailable, match="broke off"):
        downloader(tmp_path, storage, counts).download(URL, DIGEST)
    assert left_in(tmp_path) == [f"{DIGEST}.part"]
    assert (counts.num_bytes, counts.num_failures) == (256, 1)
    storage.object.reads.clear()
    downloader(tmp_path, storage, counts).download(URL, DIGEST)  # another BlobStore, as after a restart
    assert storage.object.reads[0] == (256, 512)
    assert counts.num_bytes == 1024
    assert left_in(tmp_path) == [DIGEST]


def test_pieces_get_smaller_after_a_break(tmp_path: Path) -> None:
    chunk = 16 * MIN_CHUNK_BYTES
    storage = OneObject(b"x" * chunk * 2, [broken(), broken(), broken()])
    uploads = BlobStore(tmp_path, max_bytes=chunk * 2)
    digest = hashlib.sha256(storage.object.content).hexdigest()
    backoff = (0.0, 0.0, 0.0)
    Downloader(storage, uploads, Counts(), chunk_bytes=chunk, backoff_seconds=backoff).download(URL, digest)
    asked = [end - start for start, end in storage.object.reads[:4]]
    assert asked == [chunk, chunk // 4, chunk // 16, chunk // 16]


def test_what_can_only_fail_again_is_not_tried_again(tmp_path: Path) -> None:
    storage = OneObject(faults=[ObjectDenied("no")])
    with pytest.raises(ObjectDenied):
        downloader(tmp_path, storage).download(URL, DIGEST)
    assert len(storage.object.reads) == 1
    assert left_in(tmp_path) == []


def test_other_bytes_than_promised_are_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match=f"object 'memory://x/law': what came has the digest .*, not {DIGEST}$"):
        downloader(tmp_path, OneObject(b"other")).download(URL, DIGEST)
    assert left_in(tmp_path) == []


def test_a_wrong_beginning_is_forgotten_so_that_the_next_attempt_succeeds(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(b"wrong")
    storage = OneObject()
    with pytest.raises(DigestMismatch, match="its beginning was of an earlier attempt"):
        downloader(tmp_path, storage).download(URL, DIGEST)
    assert left_in(tmp_path) == []
    downloader(tmp_path, storage).download(URL, DIGEST)
    assert left_in(tmp_path) == [DIGEST]


def test_a_beginning_longer_than_the_object_is_forgotten_at_once(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(CONTENT + b"more")
    downloader(tmp_path, OneObject()).download(URL, DIGEST)
    assert (tmp_path / DIGEST).read_bytes() == CONTENT


def test_a_partial_file_that_lacks_nothing_is_only_verified(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(CONTENT)
    storage = OneObject()
    downloader(tmp_path, storage).download(URL, DIGEST)
    assert storage.object.reads == []
    assert left_in(tmp_path) == [DIGEST]


def test_a_too_large_object_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(b"half")
    storage = OneObject()
    with pytest.raises(UploadTooLarge, match="object 'memory://x/law' has 1024 bytes, at most 1023 are allowed"):
        downloader(tmp_path, storage, max_bytes=1023).download(URL, DIGEST)
    assert storage.object.reads == []
    assert left_in(tmp_path) == []


def test_an_empty_object_is_an_upload_too(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    downloader(tmp_path, OneObject(b"")).download(URL, digest)
    assert left_in(tmp_path) == [digest]


def test_a_stopped_downloader_keeps_what_came(tmp_path: Path) -> None:
    storage = OneObject()
    stopped = downloader(tmp_path, storage)
    (tmp_path / f"{DIGEST}.part").write_bytes(CONTENT[:100])
    stopped.stop()
    with pytest.raises(DownloadStopped):
        stopped.download(URL, DIGEST)
    assert storage.object.reads == []
    assert (tmp_path / f"{DIGEST}.part").read_bytes() == CONTENT[:100]


def test_stopping_ends_a_wait_for_another_holder(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=5000)
    waiting = Downloader(OneObject(), uploads, Counts(), chunk_bytes=256)
    with uploads.resume(DIGEST, wait=time.sleep):
        waiting.stop()
        with pytest.raises(DownloadStopped):
            waiting.download(URL, DIGEST)


def test_of_two_processes_one_downloads(tmp_path: Path) -> None:
    """Each BlobStore stands for a process: they share nothing but the folder."""
    storage = OneObject()
    may_read, is_reading = threading.Event(), threading.Event()
    read_at_once = storage.object.read

    def read(start: int, end: int) -> bytes:
        is_reading.set()
        assert may_read.wait(WAIT_SECONDS)
        return read_at_once(start, end)

    storage.object.read = read  # type: ignore[method-assign]
    threads = [threading.Thread(target=downloader(tmp_path, storage).download, args=(URL, DIGEST)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert is_reading.wait(WAIT_SECONDS)
    may_read.set()
    for thread in threads:
        thread.join()
    assert len(storage.object.reads) == 4
    assert left_in(tmp_path) == [DIGEST]


def test_a_holder_is_waited_for_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "law.part"
    waits: list[float] = []
    first = PartialFile(path, wait=time.sleep)
    first.append(b"abc")

    def wait(seconds: float) -> None:
        waits.append(seconds)
        with first:
            first.discard()

    with PartialFile(path, wait=wait) as second:
        assert (len(waits), second.num_bytes) == (1, 0)


def test_partial_files_are_kept_for_a_week_after_a_restart(tmp_path: Path) -> None:
    young, old = tmp_path / f"{DIGEST}.part", tmp_path / f"{'0' * 64}.part"
    for path in (young, old):
        path.write_bytes(b"half")
    weeks_ago = time.time() - PARTIAL_KEPT_SECONDS - 60
    os.utime(old, (weeks_ago, weeks_ago))
    BlobStore(tmp_path, max_bytes=10).close()
    assert left_in(tmp_path) == [young.name]
