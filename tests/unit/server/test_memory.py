"""What a container's limit leaves, read from files as the kernel writes them."""

from pathlib import Path

from server.memory import NO_LIMIT, container_bytes


def test_page_cache_that_can_be_given_back_is_available(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 100\ninactive_file 500\n")
    assert container_bytes(tmp_path) == 600


def test_older_control_groups_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("900\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500\n")
    assert container_bytes(tmp_path) == 600


def test_without_a_limit_the_container_leaves_everything(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == NO_LIMIT
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) == NO_LIMIT
