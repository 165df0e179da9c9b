"""Clients that hang up on the real engine, in whatever phase: no block, lease or place stays taken."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.engine import Engine
from engine.model.base import Base, load_base
from server.compose import compose_app_for
from server.config import load_settings
from server.service import Service
from tests.integration.server.test_compose import ask, write_domain, write_router
from tests.integration.server.test_lifecycle import ask_at
from tests.servers import WAIT_SECONDS, run_app_in_thread, wait_until

PROMPT = "the quick brown fox " * 20
HEARTBEAT_SECONDS = 0.3


class StepGate:
    """Stands before the runner, and holds a step until it may go on."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._left = 0
        self.is_held = threading.Event()
        self._may_go = threading.Event()
        self._may_go.set()

    def __call__(self, *rows: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self.is_held.set()
            assert self._may_go.wait(WAIT_SECONDS)
        return self._run(*rows)

    def hold(self, step: int) -> None:
        """The step that comes after `step - 1` others."""
        self.is_held.clear()
        self._may_go.clear()
        self._left = step

    def open(self) -> None:
        self._may_go.set()


@dataclass
class RealServer:
    """A server with a tiny base, a router and two domains."""

    url: str
    service: Service
    engine: Engine
    gate: StepGate

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_SECONDS)

    def assert_nothing_is_left(self) -> None:
        """Of blocks, places in the batch and in the house, and leases."""
        wait_until(lambda: self.service.admission.admitted == 0, what="no sequence is admitted")
        wait_until(lambda: self.engine.snapshot().running + self.engine.snapshot().waiting == 0, what="nothing runs")
        wait_until(lambda: self.engine.snapshot().kv_used_ratio == 0.0, what="no block is held")
        wait_until(lambda: self.service.catalog.cache.snapshot().leased_bytes == 0, what="no byte is leased")
        self.service.catalog.cache.check_integrity()


@pytest.fixture(scope="module")
def real(tiny_base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("real")
    base: Base = load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="float32", device="cpu")
    server: dict[str, object] = {"admin_key": "k", "heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "drain_seconds": 2}
    engine = {"max_model_len": 400, "kv_cache_tokens": 1024, "max_batch_rows": 1, "fused_step": False}
    store = {"path": folder / "store", "import_root": folder, "device_budget_bytes": 10**8}
    settings = load_settings(flags={"server": server, "engine": engine, "store": store})
    app = compose_app_for(base, settings)
    service = app.state.service
    gate = StepGate(service.engine._runner.run)
    service.engine._runner.run = gate
    with run_app_in_thread(app, settings.server) as (_, url):
        live = RealServer(url, service, service.engine, gate)
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, timeout=WAIT_SECONDS) as client:
            for seed, domain in enumerate(("law", "math")):
                file = write_domain(folder, base, domain, seed=seed)
                put = client.put(f"/admin/domains/{domain}", json={"stacks": [{"path": file}]})
                assert put.status_code == 201, put.text
            router = {"path": write_router(folder, base, ("law", "math"))}
            assert client.put("/admin/router", json=router).status_code == 200
        yield live
        gate.open()


@pytest.mark.parametrize("phase", ["route", "queue", "prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_who_hangs_up_leaves_nothing_behind(real: RealServer, phase: str, stream: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "stream": stream}
    fields |= {"brainstacks": {"mode": "auto" if phase == "route" else "all"}}
    text = f"{PROMPT} {phase} {stream}"  # so that neither its route nor its blocks are known
    with real.client() as client:
        before = ask(client).json()["choices"]
    real.gate.hold(6 if phase == "decode" else 1)
    if phase == "queue":
        with ask_at(real.url, "first in the only row", **fields):
            assert real.gate.is_held.wait(WAIT_SECONDS)
            with ask_at(real.url, text, **fields):
                wait_until(lambda: real.service.admission.admitted == 2, what="the second waits")
                wait_until(lambda: real.engine._commands.qsize() > 0, what="the engine is told")
    else:
        with ask_at(real.url, text, **fields):
            assert real.gate.is_held.wait(WAIT_SECONDS)
    wait_until(lambda: real.service.admission.admitted == 0, what="the places are given back, whatever the engine does")
    real.gate.open()
    real.assert_nothing_is_left()
    with real.client() as client:
        assert ask(client).json()["choices"] == before


def test_engine_whose_step_blocks_is_not_ready_until_it_goes_on(real: RealServer) -> None:
    with real.client() as client:
        assert client.get("/health/ready").status_code == 200
        real.gate.hold(3)
        with ask_at(real.url, "hello", max_tokens=20):
            assert real.gate.is_held.wait(WAIT_SECONDS)
            wait_until(lambda: client.get("/health/ready").status_code == 503, what="it is not ready")
            shown = client.get("/health/ready").json()
            assert shown["status"] == "engine silent"
            assert shown["heartbeat_age_seconds"] > HEARTBEAT_SECONDS
            assert client.get("/health/live").status_code == 200
            real.gate.open()
            wait_until(lambda: client.get("/health/ready").status_code == 200, what="it is ready again")
    real.assert_nothing_is_left()
