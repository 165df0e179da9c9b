"""An upload is whole and what its digest names, or it is not there."""

import hashlib
import time
from pathlib import Path

import pytest

from stack_store.errors import DigestMismatch, UploadNotFound, UploadTooLarge
from stack_store.uploads import BlobStore

CONTENT = b"abc" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_an_upload_is_there_once_it_is_committed(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path / "uploads", max_bytes=len(CONTENT))
    with uploads.receive(DIGEST) as writer:
        for start in range(0, len(CONTENT), 7):
            writer.write(CONTENT[start : start + 7])
        with pytest.raises(UploadNotFound, match=f"no upload has the digest {DIGEST}"):
            uploads.blob_path(DIGEST)
        assert writer.commit() == uploads.blob_path(DIGEST)
    assert uploads.blob_path(DIGEST).read_bytes() == CONTENT


def test_the_folder_is_made_for_the_first_file_that_comes(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path / "uploads", max_bytes=len(CONTENT))
    assert not uploads.has(DIGEST)
    uploads.remove(DIGEST)
    assert list(tmp_path.iterdir()) == []
    with uploads.resume(DIGEST, wait=time.sleep) as partial:
        partial.append(CONTENT)
        uploads.complete(partial, DIGEST)
    assert uploads.has(DIGEST)
    uploads.close()


def test_nothing_is_tidied_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".0123456789abcdef.tmp").write_bytes(b"half")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as on a read-only file system
    BlobStore(tmp_path, max_bytes=10).close()
    assert [path.name for path in tmp_path.iterdir()] == [".0123456789abcdef.tmp"]


def test_other_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=100)
    with uploads.receive(DIGEST) as writer:
        writer.write(b"other")
        with pytest.raises(DigestMismatch, match=f"upload {DIGEST} has the digest "):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_an_upload_of_too_many_bytes_is_refused_as_soon_as_they_come(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=10)
    with uploads.receive(DIGEST) as writer:
        writer.write(b"0123456789")
        with pytest.raises(UploadTooLarge, match=f"upload {DIGEST} has more than 10 bytes"):
            writer.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=10)
    with uploads.receive(DIGEST) as writer:
        writer.write(b"0123")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_digest_is_refused(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=10)
    for name in ("../../etc/passwd", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", ""):
        with pytest.raises(DigestMismatch, match="is not a sha256 in lower-case hex"):
            uploads.receive(name)
        with pytest.raises(DigestMismatch, match="is not a sha256 in lower-case hex"):
            uploads.blob_path(name)


def test_a_restart_keeps_whole_uploads_and_removes_unfinished_ones(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=len(CONTENT))
    with uploads.receive(DIGEST) as writer:
        writer.write(CONTENT)
        writer.commit()
    (tmp_path / ".0123456789abcdef.tmp").write_bytes(b"half")
    beside = BlobStore(tmp_path, max_bytes=10)
    assert (tmp_path / ".0123456789abcdef.tmp").exists()
    beside.close()
    uploads.close()
    BlobStore(tmp_path, max_bytes=10)
    assert [path.name for path in tmp_path.iterdir()] == [DIGEST]


def test_a_removed_upload_is_gone(tmp_path: Path) -> None:
    uploads = BlobStore(tmp_path, max_bytes=len(CONTENT))
    with uploads.receive(DIGEST) as writer:
        writer.write(CONTENT)
        writer.commit()
    uploads.remove(DIGEST)
    uploads.remove(DIGEST)
    with pytest.raises(UploadNotFound):
        uploads.blob_path(DIGEST)
