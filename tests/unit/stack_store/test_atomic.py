"""A file appears whole, after its bytes are on the disk and before its name is."""

import os
from pathlib import Path

import pytest

from stack_store.atomic import make_folder, replace_file, staged_file


def test_a_file_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replace_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as file:
        _write_and_stop(file.fileno())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_committed_vanishes(tmp_path: Path) -> None:
    with staged_file(tmp_path) as staged:
        staged.file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_flushed_before_they_bear_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "file", []
    flush, replace = os.fsync, os.replace

    def noted_flush(descriptor: int) -> None:
        what = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append("flush folder" if what == str(tmp_path) else f"flush {os.fstat(descriptor).st_size} bytes")
        flush(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        steps.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(os, "replace", noted_replace)
    with replace_file(path) as file:
        file.write(b"12345")
    assert steps == ["flush 5 bytes", "name file", "flush folder"]
    make_folder(tmp_path / "folder")
    assert steps[3:] == ["flush folder"]


def _write_and_stop(descriptor: int) -> None:
    os.write(descriptor, b"half")
    raise KeyboardInterrupt
