"""Chooses how many threads compute and how long they spin. Knows cores, not torch: it runs before torch is imported.

OpenMP threads that spin while they wait are right for many small operations on idle cores and ruinous beside another
busy thread; so the spin is bounded. The OpenMP runtime reads these variables once, when torch is imported.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

MAX_CHOSEN_THREADS = 8
SPIN_COUNT = 20_000

THREADS_VARIABLE = "OMP_NUM_THREADS"
SPIN_VARIABLE = "GOMP_SPINCOUNT"


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """The variables that thread the engine's products, and why they are what they are."""

    variables: Mapping[str, str]
    reason: str


def thread_plan(cores: int, override: int | None = None) -> ThreadPlan:
    """One thread a core up to a bound, or what the operator asked for."""
    num_threads = min(cores, MAX_CHOSEN_THREADS) if override is None else override
    reason = f"chosen for {cores} cores" if override is None else f"set by engine.threads on {cores} cores"
    return ThreadPlan({THREADS_VARIABLE: str(num_threads), SPIN_VARIABLE: str(SPIN_COUNT)}, reason)


def apply_thread_plan(plan: ThreadPlan, environ: MutableMapping[str, str], *, is_override: bool) -> Mapping[str, str]:
    """Sets the variables and returns those that hold. One that is set already stays, unless the plan is an override."""
    if is_override:
        environ.pop(THREADS_VARIABLE, None)
    for name, value in plan.variables.items():
        environ.setdefault(name, value)
    return {name: environ[name] for name in plan.variables}
