"""An administrator reaches the files under the import root, and nothing else."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from stack_store.errors import ImportRefused
from stack_store.import_path import open_import, resolve_import


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """imports/good, imports/folder/inner, and beside it imports-sibling with secrets."""
    root = tmp_path / "imports"
    (root / "folder").mkdir(parents=True)
    (root / "good").write_text("good")
    (root / "folder" / "inner").write_text("inner")
    (tmp_path / "imports-sibling").mkdir()
    (tmp_path / "imports-sibling" / "secret").write_text("secret")
    (tmp_path / "imports-sibling" / "inner").write_text("a secret by the name of a file under the root")
    return root


@pytest.mark.parametrize(("relative", "content"), [("good", "good"), ("folder/inner", "inner"), ("./good", "good")])
def test_a_file_under_the_root_is_found(root: Path, relative: str, content: str) -> None:
    assert resolve_import(root, relative).read_text() == content
    with open_import(root, relative) as file:
        assert file.read().decode() == content
        assert file.name == relative


@pytest.mark.parametrize(
    ("relative", "fault"),
    [
        ("/etc/passwd", "path '/etc/passwd' is absolute"),
        ("../imports-sibling/secret", "contains '..'"),
        ("folder/../../imports-sibling/secret", "contains '..'"),
        ("folder/../good", "contains '..'"),
        ("nothing", "path 'nothing' can't be found under the import root"),
        ("good/inner", "can't be found"),
        ("nul\0byte", "can't be found"),
        ("x" * 5000, "can't be found"),
        ("folder", "path 'folder' is not a regular file"),
        ("", "path '' is not a regular file"),
    ],
)
def test_a_path_that_names_no_file_under_the_root_is_refused(root: Path, relative: str, fault: str) -> None:
    for find in (resolve_import, open_import):
        with pytest.raises(ImportRefused, match=fault):
            find(root, relative)


def test_an_absolute_path_is_refused_even_under_the_root(root: Path) -> None:
    with pytest.raises(ImportRefused, match="is absolute"):
        resolve_import(root, str(root / "good"))


def test_a_link_out_of_the_root_is_refused(root: Path) -> None:
    (root / "file-link").symlink_to(root.parent / "imports-sibling" / "secret")
    (root / "folder-link").symlink_to(root.parent / "imports-sibling")
    (root / "loop").symlink_to("loop")
    for relative in ("file-link", "folder-link/secret"):
        with pytest.raises(ImportRefused, match=f"path '{relative}' leaves the import root through a symlink"):
            open_import(root, relative)
    with pytest.raises(ImportRefused, match="can't be found"):
        open_import(root, "loop")


def test_a_link_within_the_root_is_followed(root: Path) -> None:
    (root / "link").symlink_to("folder")
    with open_import(root, "link/inner") as file:
        assert file.read() == b"inner"


def test_a_root_that_is_itself_a_link_works(root: Path) -> None:
    (root.parent / "link-to-root").symlink_to(root)
    assert resolve_import(root.parent / "link-to-root", "good") == root / "good"


def test_a_pipe_is_refused_without_waiting_for_it(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(ImportRefused, match="path 'pipe' is not a regular file"):
        open_import(root, "pipe")


def _swap_file_for_link(root: Path) -> None:
    (root / "folder" / "inner").unlink()
    (root / "folder" / "inner").symlink_to(root.parent / "imports-sibling" / "secret")


def _swap_folder_for_link(root: Path) -> None:
    (root / "folder" / "inner").unlink()
    (root / "folder").rmdir()
    (root / "folder").symlink_to(root.parent / "imports-sibling")


def _swap_file_for_pipe(root: Path) -> None:
    (root / "folder" / "inner").unlink()
    os.mkfifo(root / "folder" / "inner")


@pytest.mark.parametrize("swap", [_swap_file_for_link, _swap_folder_for_link, _swap_file_for_pipe])
def test_what_is_swapped_between_check_and_open_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path], None]
) -> None:
    resolve_to_file = Path.is_file

    def is_file_and_then_swapped(path: Path) -> bool:
        answer = resolve_to_file(path)
        swap(root)
        return answer

    monkeypatch.setattr(Path, "is_file", is_file_and_then_swapped)
    with pytest.raises(ImportRefused, match=r"path 'folder/inner' (changed|is not a regular file)"):
        open_import(root, "folder/inner")


def test_an_opened_file_stays_the_one_that_was_checked(root: Path) -> None:
    with open_import(root, "good") as file:
        (root / "good").unlink()
        (root / "good").symlink_to(root.parent / "imports-sibling" / "secret")
        assert file.read() == b"good"
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)
