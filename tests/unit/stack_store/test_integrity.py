"""Looking at registered files again: what is found, at which rate, and what is no fault."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stack_store.integrity import CHUNK_BYTES, IntegrityCheck, digest_on_disk
from stack_store.registry import StackRegistry
from tests.fakes import tiny_header, write_random_stack
from tests.servers import make_store

WAIT_SECONDS = 10.0


class Notes:
    """An IntegrityObserver that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, bool]] = []

    def verified(self, num_bytes: int, *, is_good: bool) -> None:
        self.heard.append((num_bytes, is_good))


def check_of(registry: StackRegistry, notes: Notes, *, rate: int = 0) -> IntegrityCheck:
    return IntegrityCheck(registry, notes, bytes_per_second=rate, interval_seconds=0.01)


def wait_until(is_true: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.002)


@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 4097])
def test_a_digest_is_that_of_all_bytes(tmp_path: Path, num_bytes: int) -> None:
    content = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(content)
    pieces: list[int] = []
    assert digest_on_disk(tmp_path / "file", pieces.append) == hashlib.sha256(content).hexdigest()
    assert sum(pieces) == num_bytes


def test_a_file_system_without_direct_reads_is_read_all_the_same() -> None:
    path = Path("/proc/self/limits")  # no file of /proc can be read past the page cache
    assert len(digest_on_disk(path, lambda num_bytes: None)) == 64


def test_good_and_damaged_files_are_told_apart(tmp_path: Path) -> None:
    registry, notes = make_store(tmp_path / "store", tmp_path / "import"), Notes()
    check, entry = check_of(registry, notes), registry.domain("math")
    assert [found.fault for found in check.check_domain(entry)] == [None]
    path = registry.stack_path(entry.stacks[0])
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    [found] = check.check_domain(entry)
    assert found.fault is not None
    assert "has the digest" in found.fault
    path.unlink()
    [found] = check.check_domain(entry)
    assert found.fault == "cannot be read: No such file or directory"
    assert check.num_damaged == 1
    assert check.faults_of(entry) == [found]
    path.write_bytes(good)
    check.check_domain(entry)
    assert check.num_damaged == 0
    assert notes.heard == [(len(good), is_good) for is_good in (True, False, False, True)]


def test_a_damaged_file_is_hashed_again_at_its_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_store(tmp_path / "store", tmp_path / "import")
    forgotten: list[str] = []
    monkeypatch.setattr(registry.files, "forget", forgotten.append)
    entry = registry.domain("math")
    path = registry.stack_path(entry.stacks[0])
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    check_of(registry, Notes()).check_domain(entry)
    assert forgotten == [entry.stacks[0].digest]


def test_a_version_that_is_replaced_meanwhile_is_no_fault(tmp_path: Path) -> None:
    registry, notes = make_store(tmp_path / "store", tmp_path / "import"), Notes()
    old = registry.domain("math")
    write_random_stack(tmp_path / "new.safetensors", tiny_header(), seed=9)
    registry.register_domain("math", [tmp_path / "new.safetensors"])
    registry.unlink_version(old)
    check = check_of(registry, notes)
    assert check.check_domain(old)[0].fault is not None  # it is told to who asks for this very version
    assert (check.num_damaged, notes.heard) == (0, [])


def test_in_the_background_all_files_are_read_at_the_rate(tmp_path: Path) -> None:
    registry, notes = make_store(tmp_path / "store", tmp_path / "import"), Notes()
    total = sum(stack.bytes for domain in registry.manifest.domains for stack in domain.stacks)
    check = check_of(registry, notes, rate=2 * total)
    began = time.monotonic()
    check.start()
    wait_until(lambda: len(notes.heard) >= 3)
    seconds = time.monotonic() - began
    check.close()
    assert seconds > 0.9 * total / (2 * total)
    assert {is_good for _, is_good in notes.heard} == {True}


def test_it_ends_in_the_middle_of_a_file(tmp_path: Path) -> None:
    registry = make_store(tmp_path / "store", tmp_path / "import")
    check = check_of(registry, Notes(), rate=1)  # a file takes hours
    check.start()
    began = time.monotonic()
    check.close()
    assert time.monotonic() - began < 2.0
    assert not [thread for thread in threading.enumerate() if thread.name == "integrity"]
    assert check.num_damaged == 0


def test_at_no_rate_nothing_is_read(tmp_path: Path) -> None:
    check = check_of(make_store(tmp_path / "store", tmp_path / "import"), Notes())
    check.start()
    assert not [thread for thread in threading.enumerate() if thread.name == "integrity"]
    check.close()
