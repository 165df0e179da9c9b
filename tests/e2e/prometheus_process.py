"""A real Prometheus with the shipped configuration, which scrapes a server every second instead of every ten."""

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from tests.e2e.server_process import free_port
from tests.tools import tool

SHIPPED = Path(__file__).parents[2] / "docker" / "prometheus"
START_SECONDS = 30.0
STOP_SECONDS = 10.0


class PrometheusProcess:
    """Scrapes `target`, host and port, and evaluates the shipped alerts; ends with the `with` block."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        self._program = tool("prometheus")
        self._config = folder / "prometheus.yml"
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(config["global"], "1s")
        config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        self._config.write_text(yaml.safe_dump(config))
        self._url = f"http://127.0.0.1:{free_port()}"
        self._http = httpx.Client(base_url=f"{self._url}/api/v1", timeout=30)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        options = [f"--config.file={self._config}", f"--storage.tsdb.path={self._folder / 'metrics'}"]
        command = [self._program, *options, f"--web.listen-address={self._url.removeprefix('http://')}"]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError((self._folder / "prometheus.log").read_text()[-4000:])
            time.sleep(0.05)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=STOP_SECONDS)
        self._http.close()

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; an expression that does not evaluate fails."""
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now, for each of its series."""
        return [float(series["value"][1]) for series in self.ask("/query", query=expression)["result"]]

    def _is_ready(self) -> bool:
        """Whether it has scraped for the first time; while it starts, it answers 503 without JSON."""
        try:
            is_up = self._http.get(f"{self._url}/-/ready").status_code == 200
            return is_up and bool(self.values("up"))
        except httpx.TransportError:
            return False
