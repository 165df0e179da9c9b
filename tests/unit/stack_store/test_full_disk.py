"""A disk that takes no more bytes: nothing is left of what was begun to fill it."""

import hashlib
from pathlib import Path

import pytest

from stack_store.atomic import StagedFile
from stack_store.registry import StackRegistry
from stack_store.uploads import BlobStore
from tests.disks import full_disk
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.unit.stack_store.test_downloads import CONTENT, DIGEST, URL, Counts, OneObject, downloader, left_in


def receive(uploads: BlobStore, content: bytes) -> None:
    with uploads.receive(hashlib.sha256(content).hexdigest()) as writer:
        writer.write(content)
        writer.commit()


@pytest.mark.parametrize("num_bytes", [5_000, 50_000])  # less and more than a file's buffer
def test_an_upload_that_finds_no_room_leaves_nothing(tmp_path: Path, num_bytes: int) -> None:
    content = b"x" * num_bytes
    uploads = BlobStore(tmp_path, max_bytes=num_bytes)
    with full_disk(max_file_bytes=4096), pytest.raises(OSError, match="File too large"):
        receive(uploads, content)
    assert left_in(tmp_path) == []


def test_a_download_that_finds_no_room_gives_back_what_it_took(tmp_path: Path) -> None:
    counts = Counts()
    with full_disk(max_file_bytes=600), pytest.raises(OSError, match="File too large"):
        downloader(tmp_path, OneObject(), counts).download(URL, DIGEST)
    assert left_in(tmp_path) == []
    assert (counts.num_bytes, counts.num_failures) == (512, 1)
    downloader(tmp_path, OneObject()).download(URL, DIGEST)
    assert (tmp_path / DIGEST).read_bytes() == CONTENT


def test_a_registration_that_finds_no_room_changes_nothing(tmp_path: Path) -> None:
    registry = StackRegistry.create(tmp_path / "store", base_fingerprint="tiny-base", geometry=tiny_geometry())
    write_random_stack(tmp_path / "law.safetensors", tiny_header(domain="law"), seed=1)
    with full_disk(max_file_bytes=4096), pytest.raises(OSError, match="File too large"):
        registry.register_domain("law", [tmp_path / "law.safetensors"])
    assert StackRegistry.open(tmp_path / "store").manifest.generation == 0
    assert left_in(tmp_path / "store" / "domains") == []


def test_a_file_that_cannot_be_flushed_can_be_discarded(tmp_path: Path) -> None:
    staged = StagedFile(tmp_path)
    with full_disk(max_file_bytes=10):
        staged.file.write(b"x" * 100)
        staged.discard()
    assert left_in(tmp_path) == []
