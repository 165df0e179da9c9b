"""Watches a server's process while it works: memory, file descriptors, threads, readiness. Knows /proc, no load."""

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.server_process import ServerProcess

MEMORY_GROWTH = 1.02  # from the second third of the run to the last
MEMORY_SECONDS = 300  # shorter runs see the server still growing into its working set
FEW = 4  # file descriptors or threads more than before


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds of the system."""

    memory_bytes: int
    file_descriptors: int
    threads: int


def held_by(pid: int) -> Held:
    folder = Path(f"/proc/{pid}")
    pages = int((folder / "statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE"), len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
    )


class ProcessWatch(threading.Thread):
    """Looks once a second at the process and whether it says that it is ready."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self._server = server
        self._done = threading.Event()
        self._before = held_by(server.pid)
        self._held: list[Held] = []
        self._unready: list[str] = []
        self._probe_seconds: list[float] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=30) as http:
            while not self._done.wait(1.0):
                self._held.append(held_by(self._server.pid))
                began = time.monotonic()
                try:
                    answer = http.get("/health/ready")
                    if answer.status_code != 200:
                        self._unready.append(f"not ready: {answer.text}")
                except httpx.HTTPError as error:
                    self._unready.append(f"not ready: {error!r}")
                self._probe_seconds.append(time.monotonic() - began)

    def stop(self) -> None:
        self._done.set()
        self.join()

    def faults(self, seconds: float) -> Iterator[str]:
        """Broken promises, in words."""
        yield from self._unready
        _, second, last = thirds(self._held)
        growth = _memory(last) / _memory(second)
        if seconds >= MEMORY_SECONDS and growth > MEMORY_GROWTH:
            yield f"memory grew by a factor of {growth:.3f} from the second third of the run to the last"
        for name in ("file_descriptors", "threads"):
            was, became = (max(getattr(held, name) for held in third) for third in (second, last))
            if became > was + FEW:
                yield f"{name} grew from {was} to {became}"
        idle = held_by(self._server.pid)
        if idle.file_descriptors > self._before.file_descriptors + FEW:
            yield f"file descriptors: {self._before.file_descriptors} before, {idle.file_descriptors} after the load"

    def summary(self) -> dict[str, Any]:
        """Medians by third of the run."""
        parts = thirds(self._held)
        ordered = sorted(self._probe_seconds)
        return {
            "before": asdict(self._before),
            "memory_mib_by_third": [round(_memory(third) / 2**20, 1) for third in parts],
            "most_file_descriptors_by_third": [max(held.file_descriptors for held in third) for third in parts],
            "most_threads_by_third": [max(held.threads for held in third) for third in parts],
            "ready_probes": len(ordered),
            "ready_probe_seconds": {"median": statistics.median(ordered), "max": ordered[-1]},
        }


@contextmanager
def watching(server: ServerProcess) -> Iterator[ProcessWatch]:
    watch = ProcessWatch(server)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


def thirds(held: Sequence[Held]) -> Sequence[Sequence[Held]]:
    """In order, as equal as they can be. ValueError if there is not one for each."""
    if (num := len(held)) < 3:
        raise ValueError(f"{num} samples have no thirds: watch for longer")
    return [held[num * part // 3 : num * (part + 1) // 3] for part in range(3)]


def _memory(third: Sequence[Held]) -> float:
    return statistics.median(held.memory_bytes for held in third)
