"""`brainstacks`, whose engine runs into a fault: `python -m tests.e2e.faulty_server FAULT serve`. Knows where it hurts.

The fault comes at the eighth step: `lost` is a device on which nothing works any more, `stuck` one that never answers.
"""

import itertools
import sys
import threading
from typing import Any, NoReturn

import server.app
from engine.runner import Runner
from server.cli import main as brainstacks

HEALTHY_STEPS = 7


def lose_device() -> None:
    """From then on whatever the engine asks of the runner fails."""

    def fail(*_: Any) -> NoReturn:
        raise RuntimeError("device lost")

    def give_way() -> None:
        for name in ("run", "base_only", "release_pack"):
            setattr(Runner, name, fail)

    _break_later(give_way)


def stick() -> None:
    """The step never ends."""
    server.app.ENGINE_STOP_SECONDS = 0.5
    _break_later(threading.Event().wait)


def _break_later(give_way: Any) -> None:
    run, steps = Runner.run, itertools.count(1)

    def run_or_break(self: Runner, *rows: Any) -> Any:
        if next(steps) > HEALTHY_STEPS:
            give_way()
            return Runner.run(self, *rows)
        return run(self, *rows)

    setattr(Runner, "run", run_or_break)  # noqa: B010 - a method is not assigned to


FAULTS = {"lost": lose_device, "stuck": stick}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    brainstacks()
