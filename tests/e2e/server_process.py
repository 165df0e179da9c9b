"""`brainstacks serve` as a process of its own, as an operator starts it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from openai import OpenAI

ADMIN_KEY = "test-admin-key"
START_SECONDS = 240.0  # a new checkout compiles the kernels at its first start
STOP_SECONDS = 60.0


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A running server with the embedded base; ends with the `with` block."""

    command: Sequence[str] = (str(Path(sys.executable).parent / "brainstacks"),)

    def __init__(self, store: Path, log: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = store
        self._log = log
        self._environ = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "BRAINSTACKS_SERVER__PORT": str(self.port),
            "BRAINSTACKS_SERVER__ADMIN_KEY": ADMIN_KEY,
            "BRAINSTACKS_STORE__PATH": str(store),
            "BRAINSTACKS_ENGINE__DTYPE": "float32",  # in which a text does not depend on who shares the batch
            **{f"BRAINSTACKS_{name.upper()}": str(value) for name, value in settings.items()},
        }
        # The server chooses its own; those of the test run are for the test run.
        for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            self._environ.pop(variable, None)
        self._process: subprocess.Popen[bytes] | None = None
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self.command, "serve"], env=self._environ, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise AssertionError(f"the server did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        self.openai.close()
        self.http.close()

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self.terminate()
        return self.wait()

    def terminate(self) -> None:
        """SIGTERM."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout=STOP_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def model(self) -> str:
        """The name of the model that routes."""
        return self.openai.models.list().data[0].id

    @property
    def log_text(self) -> str:
        """Everything that the server logged so far."""
        return self._log.read_text()

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A call with the admin key."""
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return self.http.request(method, path, headers=headers, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value now, summed over the samples that carry the labels; 0 if there is none."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
                total += float(match[3])
        return total

    def resident_memory_bytes(self) -> int:
        """The process's resident memory as the system counts it."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
