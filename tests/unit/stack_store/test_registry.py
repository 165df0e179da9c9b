"""A registry remembers what was registered, changes nothing that it refuses, and deletes only what nobody names."""

import logging
from collections.abc import Callable
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stack_store.errors import (
    DomainInvalid,
    DomainNameInvalid,
    DomainNotFound,
    DomainTooLarge,
    GenerationConflict,
    ManifestInvalid,
    StackIncompatible,
    StackInvalid,
    StoreExists,
    StoreNotFound,
)
from stack_store.format import read_stack, resident_bytes
from stack_store.manifest import DomainEntry
from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.servers import make_store
from tests.unit.stack_store.listing import list_store


@pytest.fixture
def registry(tmp_path: Path) -> StackRegistry:
    return StackRegistry.create(tmp_path / "store", base_fingerprint="tiny-base", geometry=tiny_geometry())


def _rounds(folder: Path, domain: str, *, num_rounds: int = 1, seed: int = 0) -> list[Path]:
    paths = [folder / f"{domain}-{seed}-{round}.safetensors" for round in range(1, num_rounds + 1)]
    for round, path in enumerate(paths, start=1):
        write_random_stack(path, tiny_header(domain=domain, round=round), seed=100 * seed + round)
    return paths


def test_a_new_store_is_empty(registry: StackRegistry) -> None:
    manifest = registry.manifest
    assert (manifest.domains, manifest.router, manifest.generation) == ((), None, 0)
    assert registry.router_path() is None
    assert list(list_store(registry.path)) == ["domains", "manifest.json", "routers"]


def test_a_registered_domain_is_there_after_a_restart(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    registration = registry.register_domain("math", sources)
    assert (registration.previous, registration.generation, registration.changed) == (None, 1, True)
    reopened = StackRegistry.open(registry.path, base_fingerprint="tiny-base", geometry=tiny_geometry())
    assert reopened.domain("math") == registration.entry == registry.domain("math")
    for round, stack in enumerate(registration.entry.stacks, start=1):
        path = reopened.stack_path(stack)
        assert path == registry.path / f"domains/math/{round}-{stack.digest[:12]}.safetensors"
        assert path.read_bytes() == sources[round - 1].read_bytes()
        assert stack.bytes == path.stat().st_size
        read_stack(path, expected_digest=stack.digest)


def test_headers_and_bytes_are_known_without_loading(registry: StackRegistry, tmp_path: Path) -> None:
    entry = registry.register_domain("math", _rounds(tmp_path, "math", num_rounds=2)).entry
    assert registry.header(entry.stacks[1]) == tiny_header(round=2)
    assert registry.resident_bytes(entry, torch.float32) == 2 * resident_bytes(tiny_header(), torch.float32)


def test_the_same_stacks_once_more_change_nothing(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    first = registry.register_domain("math", sources)
    before = list_store(registry.path)
    again = registry.register_domain("math", sources)
    assert (again.entry, again.previous, again.generation, again.changed) == (first.entry, first.entry, 1, False)
    assert list_store(registry.path) == before


def test_registering_once_more_heals_a_damaged_copy(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math")
    entry = registry.register_domain("math", sources).entry
    before = list_store(registry.path)
    registry.stack_path(entry.stacks[0]).write_bytes(b"rot")
    assert not registry.register_domain("math", sources).changed
    assert list_store(registry.path) == before


def test_a_replaced_version_keeps_its_files_until_it_is_unlinked(registry: StackRegistry, tmp_path: Path) -> None:
    old = registry.register_domain("math", _rounds(tmp_path, "math", num_rounds=2)).entry
    registry.register_domain("chat", _rounds(tmp_path, "chat"))
    replacement = registry.register_domain("math", _rounds(tmp_path, "math", seed=1))
    assert (replacement.previous, replacement.generation, replacement.changed) == (old, 3, True)
    assert [domain.name for domain in registry.manifest.domains] == ["math", "chat"]
    assert all(registry.stack_path(stack).exists() for stack in old.stacks)
    assert registry.unlink_version(old) == sum(stack.bytes for stack in old.stacks)
    assert not any(registry.stack_path(stack).exists() for stack in old.stacks)
    assert registry.stack_path(replacement.entry.stacks[0]).exists()
    assert registry.unlink_version(old) == 0


def test_a_stack_that_two_versions_share_is_not_unlinked(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    old = registry.register_domain("math", sources[:1]).entry
    new = registry.register_domain("math", sources).entry
    assert old.stacks[0] == new.stacks[0]
    assert registry.unlink_version(old) == 0
    assert registry.stack_path(old.stacks[0]).exists()


def test_a_removed_domain_is_gone_and_its_files_go_when_told(registry: StackRegistry, tmp_path: Path) -> None:
    empty = {**list_store(registry.path)}
    entry = registry.register_domain("math", _rounds(tmp_path, "math")).entry
    removal = registry.remove_domain("math")
    assert (removal.entry, removal.generation) == (entry, 2)
    with pytest.raises(DomainNotFound, match="the store has no domain 'math'"):
        registry.domain("math")
    with pytest.raises(DomainNotFound, match="the store has no domain 'math'"):
        registry.remove_domain("math")
    assert registry.stack_path(entry.stacks[0]).exists()
    assert registry.unlink_version(entry) == entry.stacks[0].bytes
    assert set(list_store(registry.path)) == set(empty)


def test_a_version_that_was_registered_anew_is_not_unlinked(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math")
    entry = registry.register_domain("math", sources).entry
    registry.remove_domain("math")
    assert registry.register_domain("math", sources).entry == entry
    assert registry.unlink_version(entry) == 0
    assert registry.stack_path(entry.stacks[0]).exists()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(registry: StackRegistry, tmp_path: Path) -> None:
    before = list_store(registry.path)
    dry = registry.register_domain("math", _rounds(tmp_path, "math"), dry_run=True)
    assert (dry.previous, dry.generation, dry.changed) == (None, 0, True)
    assert list_store(registry.path) == before
    assert registry.manifest.domains == ()
    assert registry.register_domain("math", _rounds(tmp_path, "math")).entry == dry.entry


def test_a_write_that_expects_another_generation_is_refused(registry: StackRegistry, tmp_path: Path) -> None:
    registry.register_domain("math", _rounds(tmp_path, "math"), expected_generation=0)
    before = list_store(registry.path)
    router = tmp_path / "router"
    save_file({"weight": torch.ones(2)}, router)
    chat = _rounds(tmp_path, "chat")
    writes: list[Callable[[], object]] = [
        lambda: registry.register_domain("chat", chat, expected_generation=0),
        lambda: registry.register_domain("chat", chat, expected_generation=0, dry_run=True),
        lambda: registry.remove_domain("math", expected_generation=0),
        lambda: registry.set_router(router, expected_generation=0),
    ]
    for write in writes:
        with pytest.raises(GenerationConflict, match="the store is at generation 1, not at 0") as conflict:
            write()
        assert (conflict.value.expected, conflict.value.current) == (0, 1)
    assert list_store(registry.path) == before


@pytest.mark.parametrize(
    ("name", "rounds", "fault"),
    [
        ("chat", (1,), "domain 'chat' is given a stack of domain 'math'"),
        ("math", (2,), r"is given the rounds \[2\], must be 1 to 1 in order"),
        ("math", (2, 1), r"is given the rounds \[2, 1\], must be 1 to 2 in order"),
        ("math", (1, 1), r"is given the rounds \[1, 1\], must be 1 to 2 in order"),
        ("math", (), "domain 'math' needs at least one stack"),
    ],
)
def test_stacks_that_do_not_make_up_the_domain_are_refused(
    registry: StackRegistry, tmp_path: Path, name: str, rounds: tuple[int, ...], fault: str
) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    before = list_store(registry.path)
    with pytest.raises(DomainInvalid, match=fault):
        registry.register_domain(name, [sources[round - 1] for round in rounds])
    assert list_store(registry.path) == before


def test_a_name_outside_the_rules_is_refused_before_any_file_is_read(registry: StackRegistry) -> None:
    with pytest.raises(DomainNameInvalid, match=r"'\.\./evil'"):
        registry.register_domain("../evil", [Path("/nonexistent")])


def test_a_domain_larger_than_the_budget_is_refused_with_the_numbers(registry: StackRegistry, tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    needed = 2 * resident_bytes(tiny_header(), torch.float32)
    before = list_store(registry.path)
    with pytest.raises(DomainTooLarge, match=f"'math' needs {needed} bytes, the budget is {needed - 1}"):
        registry.register_domain("math", sources, max_resident_bytes=needed - 1)
    assert list_store(registry.path) == before
    registry.register_domain("math", sources, max_resident_bytes=needed)
    registry.register_domain("math", sources, max_resident_bytes=needed // 2, dtype=torch.bfloat16)


def test_an_open_file_is_read_from_its_start_and_left_open(registry: StackRegistry, tmp_path: Path) -> None:
    [source] = _rounds(tmp_path, "math")
    with source.open("rb") as file:
        file.seek(100)
        registry.register_domain("math", [file])
        assert not file.closed


def test_what_was_opened_is_registered_whatever_takes_its_name(registry: StackRegistry, tmp_path: Path) -> None:
    [source] = _rounds(tmp_path, "math")
    content = source.read_bytes()
    with source.open("rb") as file:
        source.unlink()
        source.write_bytes(b"something else")
        entry = registry.register_domain("math", [file]).entry
    assert registry.stack_path(entry.stacks[0]).read_bytes() == content


def test_a_file_that_shrinks_while_it_is_read_is_refused(registry: StackRegistry, tmp_path: Path) -> None:
    geometry = tiny_geometry(hidden=256, intermediate=512)
    registry = StackRegistry.create(tmp_path / "wide", base_fingerprint="tiny-base", geometry=geometry)
    source = tmp_path / "math"
    write_random_stack(source, tiny_header(geometry=geometry))
    before = list_store(registry.path)

    class ShrinkingFile(BufferedReader):
        def readinto(self, buffer: Any, /) -> int:
            with source.open("r+b") as file:
                file.truncate(20_000)
            return super().readinto(buffer)

    with ShrinkingFile(FileIO(source)) as file, pytest.raises(StackInvalid, match="it shrank while tensor"):
        registry.register_domain("math", [file])
    assert list_store(registry.path) == before


def test_a_file_is_registered_a_chunk_at_a_time(tmp_path: Path) -> None:
    geometry = tiny_geometry(num_layers=1, hidden=8, intermediate=100_000)
    registry = StackRegistry.create(tmp_path / "wide", base_fingerprint="tiny-base", geometry=geometry)
    source, chunks = tmp_path / "math", []
    write_random_stack(source, tiny_header(geometry=geometry))

    class WatchedFile(BufferedReader):
        def readinto(self, buffer: Any, /) -> int:
            chunks.append(len(buffer))
            return super().readinto(buffer)

    with WatchedFile(FileIO(source)) as file:
        entry = registry.register_domain("math", [file]).entry
    assert max(chunks) <= 1 << 20 < source.stat().st_size // 4
    assert registry.stack_path(entry.stacks[0]).read_bytes() == source.read_bytes()


def test_a_store_of_another_base_is_not_opened(registry: StackRegistry) -> None:
    with pytest.raises(StackIncompatible, match="is for base 'tiny-base', not for 'other'"):
        StackRegistry.open(registry.path, base_fingerprint="other")
    with pytest.raises(StackIncompatible, match="fits a base of Geometry"):
        StackRegistry.open(registry.path, geometry=tiny_geometry(num_layers=5))


def test_a_folder_that_is_no_store_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"is not a store: it has no manifest\.json"):
        StackRegistry.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestInvalid, match="lacks base_fingerprint"):
        StackRegistry.open(tmp_path)


def test_a_store_is_not_made_twice(registry: StackRegistry) -> None:
    with pytest.raises(StoreExists, match="is a store already"):
        StackRegistry.create(registry.path, base_fingerprint="x", geometry=tiny_geometry())


def test_a_router_is_copied_and_switched(registry: StackRegistry, tmp_path: Path) -> None:
    source = tmp_path / "router.safetensors"
    save_file({"weight": torch.ones(2)}, source, {"kind": "router"})
    manifest = registry.set_router(source)
    assert manifest.generation == 1
    assert manifest.router is not None
    path = registry.router_path()
    assert path == registry.path / f"routers/{manifest.router.digest[:12]}.safetensors"
    assert path.read_bytes() == source.read_bytes()
    assert manifest.router.bytes == len(source.read_bytes())
    assert registry.set_router(source).generation == 1
    assert StackRegistry.open(registry.path).manifest.router == manifest.router


def test_a_bad_router_file_is_refused_and_the_old_one_stays(registry: StackRegistry, tmp_path: Path) -> None:
    source = tmp_path / "router.safetensors"
    save_file({"weight": torch.ones(2)}, source)
    registry.set_router(source)
    before = list_store(registry.path)
    save_file({"weight": torch.tensor([1.0, float("nan")])}, source)
    with pytest.raises(StackInvalid, match="tensor 'weight' holds a value that is not finite"):
        registry.set_router(source)
    source.write_text("no router")
    with pytest.raises(StackInvalid, match="is not a safetensors file"):
        registry.set_router(source)
    assert list_store(registry.path) == before


def test_several_domains_and_a_router_are_one_change(registry: StackRegistry, tmp_path: Path) -> None:
    router = tmp_path / "router.safetensors"
    save_file({"weight": torch.ones(2)}, router)
    domains = {"math": _rounds(tmp_path, "math", num_rounds=2), "chat": _rounds(tmp_path, "chat")}
    manifest = registry.import_domains(domains, router=router)
    assert manifest.generation == 1
    assert [(domain.name, len(domain.stacks)) for domain in manifest.domains] == [("math", 2), ("chat", 1)]
    path = registry.router_path()
    assert path is not None
    assert path.read_bytes() == router.read_bytes()
    assert StackRegistry.open(registry.path).manifest == manifest
    assert registry.import_domains(domains, router=router).generation == 1


def test_one_bad_file_among_several_domains_changes_nothing(registry: StackRegistry, tmp_path: Path) -> None:
    before = list_store(registry.path)
    chat = _rounds(tmp_path, "chat")
    router = tmp_path / "router.safetensors"
    router.write_text("no router")
    with pytest.raises(StackInvalid, match="is not a safetensors file"):
        registry.import_domains({"chat": chat}, router=router)
    with pytest.raises(DomainInvalid, match="is given a stack of domain 'chat'"):
        registry.import_domains({"chat": chat, "math": chat}, router=None)
    assert list_store(registry.path) == before


def test_the_first_to_open_a_store_removes_what_a_crash_left(
    registry: StackRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register_domain("math", _rounds(tmp_path, "math"))
    before = list_store(registry.path)
    _scatter_leftovers(registry.path)
    registry.close()
    with caplog.at_level(logging.INFO):
        reopened = StackRegistry.open(registry.path)
    assert list_store(reopened.path) == before
    assert len([record for record in caplog.records if record.message.startswith("leftover file removed")]) == 4


def test_who_opens_a_store_beside_another_removes_nothing(registry: StackRegistry, tmp_path: Path) -> None:
    registry.register_domain("math", _rounds(tmp_path, "math"))
    _scatter_leftovers(registry.path)
    before = list_store(registry.path)
    StackRegistry.open(registry.path)
    assert list_store(registry.path) == before


def test_what_the_store_did_not_make_is_never_removed(registry: StackRegistry) -> None:
    (registry.path / "domains" / "notes").mkdir()
    for file in ("README", ".hidden", "domains/README.tmp", "domains/notes/1.safetensors"):
        (registry.path / file).write_text("mine")
    before = list_store(registry.path)
    registry.close()
    StackRegistry.open(registry.path)
    assert list_store(registry.path) == before


def test_a_copy_by_git_opens_without_its_empty_folders(registry: StackRegistry) -> None:
    registry.close()
    (registry.path / "domains").rmdir()
    (registry.path / "routers").rmdir()
    assert StackRegistry.open(registry.path).manifest.domains == ()


def test_a_registry_sees_what_another_one_wrote_before_it_writes(registry: StackRegistry, tmp_path: Path) -> None:
    other = StackRegistry.open(registry.path)
    other.register_domain("math", _rounds(tmp_path, "math"))
    with pytest.raises(GenerationConflict, match="at generation 1, not at 0"):
        registry.register_domain("chat", _rounds(tmp_path, "chat"), expected_generation=0)
    registration = registry.register_domain("chat", _rounds(tmp_path, "chat"))
    assert registration.generation == 2
    assert [domain.name for domain in registry.manifest.domains] == ["math", "chat"]


def test_versions_are_the_same_in_every_store(tmp_path: Path) -> None:
    sources = _rounds(tmp_path, "math", num_rounds=2)
    entries: list[DomainEntry] = []
    for name in ("one", "two"):
        store = StackRegistry.create(tmp_path / name, base_fingerprint="tiny-base", geometry=tiny_geometry())
        entries.append(store.register_domain("math", sources).entry)
    assert entries[0].version == entries[1].version


def _scatter_leftovers(path: Path) -> None:
    (path / "domains" / "chat").mkdir()
    (path / "domains" / "empty").mkdir()
    (path / ".0123456789abcdef.tmp").write_bytes(b"half a manifest")
    (path / "domains" / ".0123456789abcdef.tmp").write_bytes(b"half a stack")
    (path / "domains" / "chat" / "1-0123456789ab.safetensors").write_bytes(b"a stack that no manifest names")
    (path / "routers" / "0123456789ab.safetensors").write_bytes(b"a router that no manifest names")
    (path / "routers" / "0123456789ab.safetensors").write_bytes(b"a router that no manifest names")


def test_only_a_folder_that_holds_nothing_of_its_own_may_become_a_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    assert StackRegistry.is_unborn(path)
    (path / "domains").mkdir(parents=True)
    (path / "routers").mkdir()
    (path / f".{'0' * 16}.tmp").write_text("a manifest that was never finished")
    assert StackRegistry.is_unborn(path)
    (path / "domains" / "notes.txt").write_text("mine")
    assert not StackRegistry.is_unborn(path)
    (path / "domains" / "notes.txt").unlink()
    (path / "notes.txt").write_text("mine")
    assert not StackRegistry.is_unborn(path)


def test_the_folder_of_a_registered_domain_stays_though_its_file_is_gone(tmp_path: Path) -> None:
    """So that whoever puts the file back finds a place for it."""
    registry = make_store(tmp_path / "store", tmp_path / "import")
    old = registry.domain("math")
    write_random_stack(tmp_path / "new.safetensors", tiny_header(), seed=9)
    entry = registry.register_domain("math", [tmp_path / "new.safetensors"]).entry
    path = registry.stack_path(entry.stacks[0])
    path.unlink()
    registry.unlink_version(old)
    path.write_bytes((tmp_path / "new.safetensors").read_bytes())
    registry.unlink_version(registry.remove_domain("math").entry)
    assert not path.parent.exists()
