"""Facts about running untrusted programs: what passes, what does not, and what is left of it: nothing."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from training.evaluating.sandbox import CHILD, Limits, Outcome, _kill_group, run_program

QUICK = Limits(wall_seconds=5.0, cpu_seconds=1)


def verdict(program: str, limits: Limits = QUICK) -> str:
    return run_program(program, limits).verdict


def test_a_program_that_runs_through_has_passed() -> None:
    program = "import math, re, collections, datetime, heapq, typing\nassert math.gcd(12, 18) == 6\nprint('x' * 10**6)"
    assert run_program(program, QUICK).passed


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def broken(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("import os\nos._exit(0)", "killed"),
        ("import os, signal\nsignal.raise_signal(signal.SIGKILL)", "killed"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("x = '\\ud800'\nassert len(x) == 1", "passed"),
    ],
)
def test_any_other_end_is_named(program: str, expected: str) -> None:
    assert verdict(program) == expected


def test_a_program_cannot_claim_to_have_passed() -> None:
    program = """
import os
for descriptor in range(3, 32):
    try:
        os.write(descriptor, b'{"secret": "", "outcome": "passed", "network": "namespace"}')
    except OSError:
        pass
os._exit(0)
"""
    assert not run_program(program, QUICK).passed


def test_an_endless_loop_is_stopped() -> None:
    began = time.monotonic()
    assert verdict("while True: pass") in ("killed", "timeout")
    assert verdict("import time\ntime.sleep(60)", Limits(wall_seconds=0.5)) == "timeout"
    assert time.monotonic() - began < 10


def test_signals_do_not_prolong_a_life() -> None:
    program = """
import signal, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
time.sleep(60)
"""
    assert verdict(program, Limits(wall_seconds=0.5)) == "timeout"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\np.join()",
    ],
)
def test_a_program_starts_no_process(program: str) -> None:
    assert verdict(program) == "PermissionError"


def test_processes_and_threads_are_refused_by_the_system_too() -> None:
    """Past the hook: neither of these raises an event that it sees."""
    forks = (
        "import _posixsubprocess\n"
        "no = (-1,) * 8\n"
        "_posixsubprocess.fork_exec([b'x'], [b'/bin/true'], True, (), None, None, *no, False, False, -1, None, None,"
        " None, -1, None, False)"
    )
    assert verdict(forks) in ("BlockingIOError", "TypeError", "ValueError")
    assert verdict("import threading\nthreading.Thread(target=print).start()") == "RuntimeError"


def test_memory_is_bounded() -> None:
    assert verdict("x = bytearray(1 << 29)", Limits(memory_bytes=256 << 20)) == "MemoryError"
    assert verdict("x = [0]\nwhile True: x += x", Limits(memory_bytes=256 << 20, wall_seconds=5)) == "MemoryError"


def test_nothing_is_written_outside_of_the_folder(tmp_path: Path) -> None:
    target, kept = tmp_path / "written", tmp_path / "kept"
    kept.write_text("old")
    for program in (
        f"open({str(target)!r}, 'w').write('x')",
        f"import os\nos.open({str(target)!r}, os.O_WRONLY | os.O_CREAT)",
        f"import pathlib\npathlib.Path({str(target)!r}).mkdir()",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'here')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/written', 'w')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
    ):
        assert verdict(program) == "PermissionError", program
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert kept.read_text() == "old"


def test_a_program_may_use_its_own_folder_within_bounds_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not where other tests' programs run meanwhile
        Path(folder).chmod(0o755)  # a program that root starts runs as nobody
        monkeypatch.setattr(tempfile, "tempdir", folder)
        program = "open('a', 'w').write('x')\nimport os\nos.rename('a', 'b')\nassert open('b').read() == 'x'"
        assert verdict(program) == "passed"
        assert verdict("open('a', 'wb').write(bytes(1 << 22))") in ("OSError", "killed")
        assert list(Path(folder).iterdir()) == []
        monkeypatch.undo()


def test_the_network_is_out_of_reach() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert verdict(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))") == "PermissionError"
        past_the_hook = f"import _socket\n_socket.socket(2, 1)\n_socket.socket().connect(('127.0.0.1', {port}))"
        assert verdict(past_the_hook) == "PermissionError"
    assert run_program("", QUICK).network in ("namespace", "hook")


def test_native_code_is_out_of_reach() -> None:
    assert verdict("import ctypes\nctypes.CDLL(None).getpid()") == "PermissionError"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert verdict("import os\nassert 'SECRET' not in os.environ\nassert 'HOME' not in os.environ") == "passed"


def test_nothing_of_the_group_survives() -> None:
    """A child that is no sandbox leaves a process behind, which holds a pipe open for as long as it lives."""
    reading, writing = os.pipe()
    program = "import os, time\nos.fork() or time.sleep(3600)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writing,), start_new_session=True) as process:
        os.close(writing)
        process.wait()
        _kill_group(process)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_the_child_imports_nothing_of_the_project() -> None:
    assert "training" not in CHILD.read_text()
    assert Outcome("passed", "hook").passed
    assert not Outcome("timeout", "unknown").passed
