"""A writer that is killed at any step leaves the old store or the new one, and the next writer succeeds.

Slower than most tests here: each step of each write is the last one of a process of its own.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from stack_store import atomic, tensor_file
from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.unit.stack_store.listing import list_store

GEOMETRY = tiny_geometry(num_layers=1)
# A step is a line of atomic.py, where all that lasts is written, or of the function that reads one chunk after another.
STEPS = {atomic.__file__: None, tensor_file.__file__: "_read_into"}
Write = Callable[[StackRegistry, Path], object]


def _add(store: StackRegistry, files: Path) -> object:
    return store.register_domain("chat", [files / "chat-1", files / "chat-2"])


def _replace(store: StackRegistry, files: Path) -> object:
    return store.register_domain("math", [files / "math-new"])


def _remove(store: StackRegistry, files: Path) -> object:
    return store.remove_domain("math")


def _route(store: StackRegistry, files: Path) -> object:
    return store.set_router(files / "router")


def _write_until_killed(write: Write, store: Path, files: Path, fatal_step: int) -> None:
    opened = StackRegistry.open(store)
    steps = count(1)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        function = STEPS.get(frame.f_code.co_filename, "")
        if function not in (None, frame.f_code.co_name):
            return None
        if event == "line" and next(steps) == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    write(opened, files)
    sys.settrace(None)


def _reopened(store: Path) -> dict[str, bytes | None]:
    StackRegistry.open(store).close()
    return list_store(store)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    stacks = {"math-old": ("math", 1), "math-new": ("math", 1), "chat-1": ("chat", 1), "chat-2": ("chat", 2)}
    for seed, (name, (domain, round)) in enumerate(stacks.items()):
        write_random_stack(folder / name, tiny_header(domain=domain, round=round, geometry=GEOMETRY), seed=seed)
    save_file({"weight": ones(2)}, folder / "router")
    return folder


@pytest.fixture(scope="module")
def old_store(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Path:
    path = tmp_path_factory.mktemp("old") / "store"
    store = StackRegistry.create(path, base_fingerprint="tiny-base", geometry=GEOMETRY)
    store.register_domain("math", [files / "math-old"])
    store.close()
    return path


@pytest.mark.parametrize("write", [_add, _replace, _remove, _route])
def test_a_writer_killed_at_any_step_leaves_the_old_store_or_the_new(
    tmp_path: Path, files: Path, old_store: Path, write: Write
) -> None:
    old, new = list_store(old_store), _written(_copy(old_store, tmp_path / "new"), write, files)
    assert new != old
    found = []
    for fatal_step in count(1):
        store = _copy(old_store, tmp_path / str(fatal_step))
        if not _is_killed(write, store, files, fatal_step):
            break
        found.append(_reopened(store))
        assert found[-1] in (old, new), f"killed at step {fatal_step}"
        assert write is _remove or _written(store, write, files) == new, f"killed at step {fatal_step}, then written"
    # One step makes the difference: the old store before it, the new one from it on.
    assert found == sorted(found, key=lambda listing: listing == new)
    assert old in found
    assert new in found


def _copy(store: Path, path: Path) -> Path:
    return Path(shutil.copytree(store, path))


def _written(store: Path, write: Write, files: Path) -> dict[str, bytes | None]:
    opened = StackRegistry.open(store)
    write(opened, files)
    opened.close()
    return _reopened(store)


def _is_killed(write: Write, store: Path, files: Path, fatal_step: int) -> bool:
    """Whether the write had that many steps."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", __name__])  # else each process imports torch anew
    process = context.Process(target=_write_until_killed, args=(write, store, files, fatal_step))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
