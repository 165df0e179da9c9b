"""A store that another process changes, as an import does: the next admin call finds it so, and so do requests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.integration.server.conftest import ADMIN_KEY
from tests.integration.server.test_lifecycle import asked, is_decoding
from tests.integration.server.test_object_storage import big_file
from tests.servers import BASE, LiveServer, ScriptedRouter, wait_until


@contextmanager
def another_process(server: LiveServer) -> Iterator[StackRegistry]:
    """Shares nothing with the server but the folder."""
    registry = StackRegistry.open(server.registry.path, base_fingerprint=BASE, geometry=tiny_geometry())
    yield registry
    registry.close()


def stack(folder: Path, domain: str, *, seed: int) -> Path:
    path = folder / f"{domain}-{seed}.safetensors"
    write_random_stack(path, tiny_header(domain=domain), seed=seed)
    return path


def shown(server: LiveServer) -> dict[str, dict[str, object]]:
    with server.client(ADMIN_KEY) as api:
        return {domain["name"]: domain for domain in api.get("/admin/domains").json()["domains"]}


def test_new_replaced_and_removed_domains_are_taken_up(server: LiveServer, tmp_path: Path) -> None:
    with server.client(ADMIN_KEY) as api:
        api.post("/admin/domains/math/pin")
        api.post("/admin/domains/code/pin")
    old = server.registry.domain("math")
    removed = server.registry.domain("code")
    with another_process(server) as other:
        other.import_domains(
            {"law": [stack(tmp_path, "law", seed=8)], "math": [stack(tmp_path, "math", seed=9)]}, router=None
        )
        other.remove_domain("code")
        domains = shown(server)
        assert list(domains) == ["chat", "math", "law"]
        assert domains["math"]["version"] == other.domain("math").version != old.version
        assert domains["math"]["pinned"] is True
    assert server.chat(model="tiny:law").json()["brainstacks"]["mix"] == {"law": 1.0}
    assert server.chat(model="tiny:code").status_code == 404
    for version in (old, removed):
        wait_until(lambda: not server.registry.stack_path(version.stacks[0]).exists(), what="its file is gone")  # noqa: B023
    keys = {entry.key for entry in server.cache.snapshot().entries}
    assert keys.isdisjoint({f"math@{old.version}", f"code@{removed.version}"})


def test_a_version_that_another_process_replaced_stays_until_its_last_request_ends(
    server: LiveServer, tmp_path: Path
) -> None:
    old = server.registry.stack_path(server.registry.domain("math").stacks[0])
    server.engine.may_decode.clear()
    with asked(server, model="tiny:math"):
        wait_until(is_decoding(server), what="a request runs")
        with another_process(server) as other:
            other.register_domain("math", [stack(tmp_path, "math", seed=9)])
        shown(server)
        assert old.exists()
        server.engine.may_decode.set()
    wait_until(lambda: not old.exists(), what="its file is gone")


def test_a_router_that_another_process_set_goes_live(server: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    path.write_bytes(big_file(num_bytes=1000))
    server.routers[path.read_bytes()[-8:].hex()] = ScriptedRouter(("code",))
    assert server.chat("code=0.9 math=0.9").json()["brainstacks"]["mix"].keys() == {"chat", "code", "math"}
    with another_process(server) as other:
        other.set_router(path)
    shown(server)
    assert server.chat("code=0.9 math=0.9").json()["brainstacks"]["scores"] == {"code": 0.9}


def test_a_router_that_cannot_be_used_leaves_the_old_one_live(
    server: LiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_it(path: Path) -> ScriptedRouter:
        raise OSError("it is odd")

    server.service.routing._load_router = refuse_it
    path = tmp_path / "router.safetensors"
    path.write_bytes(big_file(num_bytes=1000))
    with another_process(server) as other:
        other.set_router(path)
    shown(server)
    assert server.chat("code=0.9").json()["brainstacks"]["scores"]["code"] == 0.9
    assert "the old one stays live reason='it is odd'" in caplog.text


def test_what_this_process_changed_is_not_taken_for_anothers(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), server.client(ADMIN_KEY) as api:
        write_random_stack(server.import_root / "law.safetensors", tiny_header(domain="law"), seed=8)
        assert api.put("/admin/domains/law", json={"stacks": [{"path": "law.safetensors"}]}).status_code == 201
        assert api.delete("/admin/domains/math").status_code == 200
        assert list(shown(server)) == ["chat", "code", "law"]
    assert "domain removed name=math" in caplog.text
    assert "another process" not in caplog.text
