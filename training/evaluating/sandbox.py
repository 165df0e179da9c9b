"""Runs generated code in a process of its own and tells whether it ran through. Knows processes, no benchmarks.

Each program gets a new process group, an empty environment, a temporary folder and hard limits (`sandboxed.py`), and
everything of the group is killed when it ends or its time is up. This keeps model output that goes wrong from doing
harm; against code written to break out, run the whole evaluation in a container: docs/evaluation.md says what it does
not protect against.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandboxed.py")
STATUS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30  # of address space, the interpreter's own included
    file_bytes: int = 1 << 20
    open_files: int = 32

    def as_rlimits(self) -> dict[str, int]:
        """The limits under the names that the operating system has for them. No new process or thread, no core."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `passed`, an exception's name, `timeout`, or `killed` if it ended its process itself."""

    verdict: str
    network: str  # what kept it off the network: namespace, hook, or unknown if it never said

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.verdict == "passed"


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a program's text to its end, or to the end of its time. Nothing of it is left when this returns."""
    limits = limits or Limits()
    secret = secrets.token_hex(16)
    request = json.dumps({"secret": secret, "limits": limits.as_rlimits()})
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        reading, writing = os.pipe()
        try:
            in_time = _run_child(f"{request}\n{program}", folder, writing, limits.wall_seconds)
            said = _read_now(reading)
        finally:
            os.close(reading)
            os.close(writing)
    return _read_outcome(said, secret, in_time=in_time)


def _run_child(request: str, folder: str, status: int, wall_seconds: float) -> bool:
    """Runs the child; returns whether it ended in time."""
    process = subprocess.Popen(  # noqa: S603  our own interpreter and our own script
        [sys.executable, "-I", "-X", "utf8", str(CHILD), str(status)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(status,),
        start_new_session=True,
    )
    try:
        process.communicate(request.encode("utf-8", "replace"), timeout=wall_seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        _kill_group(process)
    return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _read_now(status: int) -> bytes:
    """What was written, without waiting for more."""
    os.set_blocking(status, False)
    try:
        return os.read(status, STATUS_BYTES)
    except BlockingIOError:
        return b""


def _read_outcome(said: bytes, secret: str, *, in_time: bool) -> Outcome:
    """Only what carries the secret counts: the program has the descriptor, but not the secret."""
    if not in_time:
        return Outcome("timeout", "unknown")
    try:
        status = json.loads(said)
    except ValueError:
        return Outcome("killed", "unknown")
    if not isinstance(status, dict) or status.get("secret") != secret:
        return Outcome("killed", "unknown")
    return Outcome(str(status["outcome"]), str(status["network"]))
