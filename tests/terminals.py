"""A command in a terminal of its own, as a person has it: Ctrl-C is a signal, and the command knows it is watched."""

import os
import pty
import select
import signal
import subprocess
import time
from types import TracebackType
from typing import Self

WAIT_SECONDS = 30.0


class Terminal:
    """Types, and waits for what is shown. Ends the command with the `with` block."""

    def __init__(self, *command: str, kind: str = "dumb") -> None:
        self._keyboard, screen = pty.openpty()
        environ = {**os.environ, "TERM": kind, "COLUMNS": "120", "NO_COLOR": "1"}
        self._process = subprocess.Popen(
            command, stdin=screen, stdout=screen, stderr=screen, env=environ, start_new_session=True, preexec_fn=_own
        )
        os.close(screen)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._keyboard)

    def type(self, text: str) -> None:
        """As if on a keyboard."""
        os.write(self._keyboard, text.encode())

    def wait_for(self, text: str, *, behind: str = "") -> None:
        """Until the text is shown, behind where the other is first."""
        assert self._is_shown(text, behind, WAIT_SECONDS), f"never shown: {text!r} in {self.shown!r}"

    def interrupt(self, *, until: str) -> None:
        """Ctrl-C until the text is shown: a signal on the brink of a read is heard only when that has ended."""
        ends = time.monotonic() + WAIT_SECONDS
        self.type("\x03")
        while not self._is_shown(until, "", 1.0):
            assert time.monotonic() < ends, f"never shown: {until!r} in {self.shown!r}"
            self.type("\x03")

    def status(self) -> int:
        """The exit status, once it has ended."""
        return self._process.wait(timeout=WAIT_SECONDS)

    def _is_shown(self, text: str, behind: str, seconds: float) -> bool:
        ends = time.monotonic() + seconds
        while text not in self.shown.partition(behind)[2] if behind else text not in self.shown:
            if (left := ends - time.monotonic()) <= 0:
                return False
            self._read(left)
        return True

    def _read(self, seconds: float) -> None:
        if select.select([self._keyboard], [], [], seconds)[0]:
            try:
                self.shown += os.read(self._keyboard, 65536).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"the command ended: {self.shown!r}") from error


def _own() -> None:
    """The new session's terminal is the one that it reads from, and Ctrl-C reaches it, even where tests ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(os.open(os.ttyname(0), os.O_RDWR))
