"""Writers of one store take turns, threads and processes alike, and none of them loses what another wrote."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

from stack_store.errors import GenerationConflict
from stack_store.registry import Registration, StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack

GEOMETRY = tiny_geometry(num_layers=1)


def _store(path: Path) -> StackRegistry:
    return StackRegistry.create(path, base_fingerprint="tiny-base", geometry=GEOMETRY)


def _sources(folder: Path, names: list[str]) -> dict[str, Path]:
    sources = {name: folder / f"{name}.safetensors" for name in names}
    for seed, (name, path) in enumerate(sources.items()):
        write_random_stack(path, tiny_header(domain=name, geometry=GEOMETRY), seed=seed)
    return sources


def test_threads_that_register_at_once_all_succeed(tmp_path: Path) -> None:
    registry, sources = _store(tmp_path / "store"), _sources(tmp_path, [f"domain{i}" for i in range(8)])
    barrier = Barrier(len(sources))

    def register(name: str) -> Registration:
        barrier.wait()
        return registry.register_domain(name, [sources[name]])

    with ThreadPoolExecutor(len(sources)) as threads:
        registrations = list(threads.map(register, sources))
    assert sorted(registration.generation for registration in registrations) == list(range(1, 9))
    assert {domain.name for domain in registry.manifest.domains} == set(sources)


def test_of_threads_that_expect_one_generation_one_succeeds(tmp_path: Path) -> None:
    registry, sources = _store(tmp_path / "store"), _sources(tmp_path, [f"domain{i}" for i in range(6)])
    barrier = Barrier(len(sources))

    def register(name: str) -> bool:
        barrier.wait()
        try:
            registry.register_domain(name, [sources[name]], expected_generation=0)
        except GenerationConflict:
            return False
        return True

    with ThreadPoolExecutor(len(sources)) as threads:
        assert sum(threads.map(register, sources)) == 1
    assert registry.manifest.generation == 1


def _register_in_turn(store: Path, sources: dict[str, Path], barrier: Any) -> None:
    registry = StackRegistry.open(store)
    barrier.wait()
    for name, source in sources.items():
        registry.register_domain(name, [source])
        registry.remove_domain(name)
        registry.register_domain(name, [source])


def test_processes_that_register_at_once_all_succeed(tmp_path: Path) -> None:
    registry = _store(tmp_path / "store")
    sources = _sources(tmp_path, [f"{letter}{i}" for letter in "ab" for i in range(5)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", __name__])
    barrier = context.Barrier(2)
    processes = []
    for letter in "ab":
        own = {name: path for name, path in sources.items() if name.startswith(letter)}
        processes.append(context.Process(target=_register_in_turn, args=(registry.path, own, barrier)))
        processes[-1].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    manifest = StackRegistry.open(registry.path).manifest
    assert {domain.name for domain in manifest.domains} == set(sources)
    assert manifest.generation == 3 * len(sources)
