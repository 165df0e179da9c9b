"""`brainstacks`, whose engine runs into a fault: `python -m tests.e2e.faulty_server FAULT serve`. Knows where it hurts.

The fault comes at the eighth step: `lost` is a device on which nothing works any more, `stuck` one that never answers,
`slow` one that needs a while for each step from then on.
"""

import itertools
import sys
import threading
import time
from typing import Any, NoReturn

import server.app
from engine.runner import Runner
from server.cli import main as brainstacks

HEALTHY_STEPS = 7
SLOW_STEP_SECONDS = 0.01


def lose_device() -> None:
    """From then on every step fails."""

    def fail(*_: Any) -> NoReturn:
        raise RuntimeError("device lost")

    _break_later(lambda: setattr(Runner, "run", fail))


def stick() -> None:
    """The step never ends."""
    server.app.ENGINE_STOP_SECONDS = 0.5
    _break_later(threading.Event().wait)


def slow_down() -> None:
    """As slow as a larger base."""
    run = Runner.run

    def run_slowly(self: Runner, *rows: Any) -> Any:
        time.sleep(SLOW_STEP_SECONDS)
        return run(self, *rows)

    _break_later(lambda: setattr(Runner, "run", run_slowly))


def _break_later(give_way: Any) -> None:
    run, steps = Runner.run, itertools.count(1)

    def run_or_break(self: Runner, *rows: Any) -> Any:
        if next(steps) > HEALTHY_STEPS:
            give_way()
            return Runner.run(self, *rows)
        return run(self, *rows)

    setattr(Runner, "run", run_or_break)  # noqa: B010 - a method is not assigned to


FAULTS = {"lost": lose_device, "stuck": stick, "slow": slow_down}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    brainstacks()
