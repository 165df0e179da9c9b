"""Runs one untrusted program inside limits that it cannot lift, and says how it ended. Run as a script, never imported.

Reads one line of JSON (a secret and the limits) and then the program from standard input; writes the secret and the
outcome to the descriptor `--status`. A program that ends the process by itself never gets to write, so it has not
passed. What holds and what does not: docs/evaluation.md. Only the standard library, so that it starts quickly and
imports nothing of the project.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

FORBIDDEN = ("socket.", "ctypes.", "subprocess.", "pty.")
FORBIDDEN_EVENTS = frozenset(
    {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system"}
    | {"os.kill", "os.killpg", "os.chown", "os.chroot", "os.setxattr", "signal.pthread_kill"}
)
# Events whose arguments are paths that they change; int arguments among them are descriptors and modes.
CHANGING_EVENTS = frozenset(
    {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"}
    | {"shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree"}
)


def main() -> None:
    """Reads, limits, runs, reports."""
    status = int(sys.argv[1])
    settings, _, program = sys.stdin.read().partition("\n")
    request: dict[str, Any] = json.loads(settings)
    network = _isolate(request)
    outcome = _run(program)
    os.write(status, json.dumps({"secret": request["secret"], "outcome": outcome, "network": network}).encode())
    os._exit(0)  # no handler that the program left behind runs after the verdict


def _isolate(request: dict[str, Any]) -> str:
    """Gives up everything that can be given up; returns what keeps the network away: `namespace` or `hook`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        _keep_library_in_reach()
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    isolated = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    for name, value in request["limits"].items():
        limit = getattr(resource, name)
        resource.setrlimit(limit, (value, value))
    sys.addaudithook(_guard(os.path.realpath(".")))
    return "namespace" if isolated else "hook"


def _keep_library_in_reach() -> None:
    """Lets imports work for a user that may not walk the path to Python's library, which may lie in root's home."""
    for folder in filter(os.path.isdir, list(sys.path)):
        reachable = f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"
        sys.path[sys.path.index(folder)] = reachable
        for module in list(sys.modules.values()):
            if hasattr(module, "__path__"):
                module.__path__ = [part.replace(folder, reachable, 1) for part in module.__path__]


def _guard(folder: str) -> Any:
    """A hook that refuses network, processes, native code and writing outside the folder. It cannot be removed."""

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real == folder or real.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN_EVENTS or event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            paths: list[Any] = [arguments[0]]
        elif event in CHANGING_EVENTS:
            paths = [argument for argument in arguments if isinstance(argument, str | bytes)]
        else:
            return
        outside = [path for path in paths if not is_inside(path)]
        if outside:
            raise PermissionError(f"{event} outside the program's folder: {outside[0]!r}")

    return hook


def _run(program: str) -> str:
    """`passed`, or the name of the exception that ended it."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # noqa: S102  this is what the limits are for
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt too: the tests did not run through
        return type(error).__name__
    return "passed"


if __name__ == "__main__":
    main()
