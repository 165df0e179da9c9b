"""What a disk or memory refuses hits only those who need it, is counted and told once, and heals with its cause.

The faults are real: the kernel's own errors, by limits of this process and by files that cannot be read.
"""

import hashlib
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from stack_store.format import pack_groups, write_stack
from tests.fakes import random_projections, tiny_header
from tests.integration.server.conftest import ADMIN_KEY
from tests.integration.server.test_admin import law_file, put_law, upload
from tests.servers import LiveServer, make_store, run_live_server, wait_until

UNREADABLE = Path("/proc/self/mem")  # opens like a file, and every read of its beginning is an input/output error
MIB = 1 << 20


@pytest.fixture
def api(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client(ADMIN_KEY) as client:
        yield client


@contextmanager
def limited(kind: int, num_bytes: int) -> Iterator[None]:
    """Within the block this process has no more of it."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond a few kilobytes."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with limited(resource.RLIMIT_FSIZE, 4096):
            yield
    finally:
        signal.signal(signal.SIGXFSZ, ignored)


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_on_a_full_disk_nothing_is_registered_and_nothing_is_left(server: LiveServer, api: httpx.Client) -> None:
    file = law_file(server)
    before, generation = files_below(server.registry.path), server.registry.manifest.generation
    with full_disk():
        refused = put_law(api, file)
        served = server.chat(model="tiny:math")
    assert code_of(refused) == (503, "disk_full")
    assert refused.headers["retry-after"] == "30"
    assert served.status_code == 200
    assert files_below(server.registry.path) == before
    assert server.registry.manifest.generation == generation
    assert server.metric("brainstacks_store_disk_faults_total", fault="full") == 1
    assert put_law(api, file).status_code == 201
    assert server.chat(model="tiny:law").status_code == 200


def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(server: LiveServer, api: httpx.Client) -> None:
    content = law_file(server).read_bytes()
    before = files_below(server.registry.path)
    with full_disk(), pytest.raises(AssertionError):  # `upload` asserts that it came
        upload(api, content)
    wait_until(lambda: files_below(server.registry.path) == before, what="no part of the upload is left")
    assert server.metric("brainstacks_store_disk_faults_total", fault="full") == 1
    upload(api, content)


def test_a_server_whose_store_takes_no_uploads_serves_and_says_why_it_takes_none(tmp_path: Path) -> None:
    """A file in the folder's place stands for a read-only file system, which binds root too."""
    make_store(tmp_path / "store", tmp_path / "import").close()
    (tmp_path / "store" / "uploads").touch()
    keys = {"server": {"admin_key": ADMIN_KEY}}
    with run_live_server(tmp_path, settings=keys) as server, server.client(ADMIN_KEY) as api:
        assert server.chat(model="tiny:math").status_code == 200
        content = law_file(server).read_bytes()
        refused = api.put(f"/admin/blobs/{hashlib.sha256(content).hexdigest()}", content=content)
        assert code_of(refused) == (503, "disk_failed")
        assert "(File exists)" in refused.json()["error"]["message"]


def test_a_manifest_that_cannot_be_written_leaves_the_old_store(server: LiveServer, api: httpx.Client) -> None:
    """The files of the change were written before it, and go again."""
    file = law_file(server)
    before = files_below(server.registry.path)
    with limited(resource.RLIMIT_FSIZE, file.stat().st_size):
        for number in range(40):  # until the manifest is longer than a stack is
            law = server.import_root / f"d{number}.safetensors"
            law.write_bytes(b"")
            header = tiny_header(domain=f"d{number}")
            write_stack(law, header, pack_groups(header, random_projections(header)))
            answer = api.put(f"/admin/domains/d{number}", json={"stacks": [{"path": law.name}]})
            if not answer.is_success:
                break
            before = files_below(server.registry.path)
    assert code_of(answer) == (503, "disk_full")
    assert files_below(server.registry.path) == before
    assert server.chat(model="tiny:math").status_code == 200


def test_a_read_error_fails_its_domain_alone_is_told_once_and_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with run_live_server(tmp_path, failure_ttl_seconds=0.05) as server:
        path = server.registry.stack_path(server.registry.domain("math").stacks[0])
        server.registry.header(server.registry.domain("math").stacks[0])  # as at the start
        good = path.with_suffix(".good")
        path.rename(good)
        path.symlink_to(UNREADABLE)

        def fails_again() -> bool:
            assert code_of(server.chat(model="tiny:math")) == (503, "load_failed")
            return server.metric("brainstacks_stack_load_failures_total", source="file") >= 3

        wait_until(fails_again, what="three loads failed")
        assert server.chat(model="tiny:code").status_code == 200
        path.unlink()
        good.rename(path)
        wait_until(lambda: server.chat(model="tiny:math").status_code == 200, what="math is served again")
        told = [r.levelname for r in caplog.records if "domain load failed" in r.getMessage()]
        assert told == ["ERROR"]
        assert "Input/output error" in caplog.text
        assert "domain load healed" in caplog.text
        wait_until(lambda: server.cache.snapshot().leased_bytes == 0, what="every lease ended")
        server.cache.check_integrity()


def test_exhausted_memory_fails_its_domain_alone_and_heals(tmp_path: Path) -> None:
    """A domain of 232 MiB, while this process may have no more than 100 beside what it has."""
    with run_live_server(tmp_path, budget_domains=40_000, failure_ttl_seconds=0.05, large_rank=65536) as server:
        assert server.resident_bytes("large") > 200 * MIB
        assert server.chat(model="tiny:base").status_code == 200
        with limited(resource.RLIMIT_AS, address_space_bytes() + 100 * MIB):
            refused = server.chat(model="tiny:large")
            assert code_of(refused) == (503, "memory_exhausted")
            assert refused.headers["retry-after"] == "5"
            assert server.chat(model="tiny:math").status_code == 200
        wait_until(lambda: server.chat(model="tiny:large").status_code == 200, what="there is memory again")


def address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_damage_is_found_in_the_background_told_once_and_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = {"verify_bytes_per_second": 10**8, "verify_interval_seconds": 0.02}
    with run_live_server(tmp_path, settings={"server": {"admin_key": "k"}, "store": store}) as server:
        entry = server.registry.domain("math")
        path = server.registry.stack_path(entry.stacks[0])
        good = path.read_bytes()
        assert server.chat(model="tiny:math").status_code == 200
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        wait_until(lambda: server.metric("brainstacks_stack_integrity_damaged_files") == 1, what="it is found")
        with server.client("k") as client:
            shown = client.get("/admin/domains/math").json()
            assert shown["damaged_files"][0]["file"] == entry.stacks[0].file
            assert "has the digest" in shown["damaged_files"][0]["fault"]
            checked = client.post("/admin/domains/math/verify").json()
            assert [file["digest"] for file in checked["files"]] == [entry.stacks[0].digest]
            assert checked["files"][0]["fault"] is not None
            assert client.post("/admin/domains/code/verify").json()["files"][0]["fault"] is None
        assert server.chat(model="tiny:math").status_code == 200  # what is resident was good when it was read
        passes = server.metric("brainstacks_stack_integrity_checks_total", result="damaged")
        wait_until(
            lambda: server.metric("brainstacks_stack_integrity_checks_total", result="damaged") > passes + 2,
            what="it is found again and again",
        )
        path.write_bytes(good)
        wait_until(lambda: server.metric("brainstacks_stack_integrity_damaged_files") == 0, what="it is good again")
        told = [r.levelname for r in caplog.records if "registered file damaged" in r.getMessage()]
        assert told == ["ERROR"]
        wait_until(lambda: "registered file good again" in caplog.text, what="it is told")
    assert not [thread.name for thread in threading.enumerate() if thread.name == "integrity"]
