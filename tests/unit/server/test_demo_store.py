"""A checkout's store begins as a copy of its demo store, once."""

from pathlib import Path

from server.demo_store import seed_store


def demo_at(folder: Path) -> Path:
    """Something to copy."""
    (folder / "demo" / "domains").mkdir(parents=True)
    (folder / "demo" / "manifest.json").write_text("{}")
    return folder / "demo"


def test_missing_store_is_a_whole_copy_and_nothing_else_is_left(tmp_path: Path) -> None:
    assert seed_store(tmp_path / "store", demo_at(tmp_path))
    assert (tmp_path / "store" / "manifest.json").read_text() == "{}"
    assert (tmp_path / "store" / "domains").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "store"}


def test_store_that_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert not seed_store(tmp_path / "store", demo_at(tmp_path))
    assert list((tmp_path / "store").iterdir()) == []
