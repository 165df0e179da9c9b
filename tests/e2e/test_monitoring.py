"""Every panel of the dashboard shows something and every alert evaluates: a real Prometheus scrapes a real server.

The server has a tiny base and room for two of its four domains. What was not to be had of it is named below.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.model.base import Base, load_base
from engine.model.moe_lora import MoeLoraConfig
from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings
from router.network import MetaRouter
from router.policy import RoutingPolicy
from stack_store.format import pack_groups, write_stack
from stack_store.registry import StackRegistry
from tests.e2e.prometheus_process import SHIPPED, PrometheusProcess
from tests.e2e.server_process import ServerProcess
from tests.stacks import header_for, random_projections
from tests.tools import tool

pytestmark = pytest.mark.e2e

DASHBOARD = SHIPPED.parent / "grafana" / "dashboards" / "brainstacks.json"
CONFIG = MoeLoraConfig(num_experts=4, rank=4, top_k=2, alpha=8.0)
ROUTED, OTHERS = ("chat", "math"), ("code", "broken")
SECONDS_TO_SHOW = 30.0
# What a query falls back to; with it, a panel would never be empty.
FALLBACK = " or vector(0)"
# As Grafana fills them in, for all servers and a scrape every second.
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "1m"}


def make_store(path: Path, base: Base) -> int:
    """Four domains, and an untrained router that finds both of its own likely and every prompt a gap; bytes of one."""
    registry = StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry)
    for seed, domain in enumerate(ROUTED + OTHERS):
        header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=domain)
        file = path.parent / f"{domain}.safetensors"
        write_stack(file, header, pack_groups(header, random_projections(base.geometry, CONFIG, seed=seed)))
        registry.register_domain(domain, [file])
    torch.manual_seed(0)
    RouterCheckpoint(
        network=MetaRouter(base.hidden_size, ROUTED, hidden_dim=16),
        settings=FeatureSettings(mid_layer=1),
        policy=RoutingPolicy(gap_threshold=1.0),
        stack_digests=dict.fromkeys(ROUTED, ()),
        base_fingerprint=base.fingerprint,
    ).save(path.parent / "router.safetensors")
    registry.set_router(path.parent / "router.safetensors")
    num_bytes = registry.resident_bytes(registry.domain("chat"), torch.float32)
    registry.close()
    return num_bytes


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Callable[[str], Path]
) -> Iterator[ServerProcess]:
    tool("prometheus")  # before anything is started in vain
    folder = tmp_path_factory.mktemp("monitored")
    base_folder = str(tiny_base_folder("llama"))
    base = load_base(base_folder, base_format="dense", dtype="float32", device="cpu")
    one_domain = make_store(folder / "store", base)
    with ServerProcess(
        folder / "store",
        folder / "log",
        engine__base=base_folder,
        engine__base_format="dense",
        engine__fused_step=False,
        engine__max_batch_rows=4,
        engine__max_model_len=128,
        engine__kv_cache_tokens=128,
        server__max_queue=4,
        server__served_model_name="tiny",
        store__device_budget_bytes=2 * one_domain,
    ) as process:
        yield process


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusProcess]:
    """It has seen the traffic twice: a series begins with its first event, which no rate shows."""
    with PrometheusProcess(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{server.port}") as process:
        for _ in range(2):
            make_traffic(server)
            answered = server.metric("brainstacks_requests_total", endpoint="/v1/chat/completions")
            counted = 'sum(brainstacks_requests_total{endpoint="/v1/chat/completions"})'
            wait_for(process, counted, at_least=answered)
        wait_for(process, 'sum(ALERTS{alertstate="firing"})', at_least=1)
        yield process


def wait_for(prometheus: PrometheusProcess, expression: str, *, at_least: float) -> None:
    """Until Prometheus has read as much, twice: a rate needs two samples of it."""
    ends = time.monotonic() + SECONDS_TO_SHOW
    while sum(prometheus.values(f"min_over_time(({expression})[2s:1s])")) < at_least:
        assert time.monotonic() < ends, f"never {at_least}: {expression}"
        time.sleep(0.2)


def make_traffic(server: ServerProcess) -> None:
    """Routed and fixed chats, streams, hits, cold loads, evictions, gaps, preemptions, and what is refused or fails."""
    for model in ("tiny", "tiny", "tiny:code", "tiny:base", "tiny"):
        assert status_of_chat(server, model=model) == 200
    assert status_of_chat(server, model="tiny:code", stream=True) == 200
    assert server.http.post("/v1/route", json={"prompt": "hello"}).status_code == 200
    assert status_of_chat(server, model="tiny:law") == 404
    assert status_of_chat(server, temperature=-1) == 400
    with ThreadPoolExecutor(12) as clients:
        together = [clients.submit(status_of_chat, server, max_tokens=40, ignore_eos=True) for _ in range(12)]
        assert {200, 429} == {answer.result() for answer in together}
    assert server.metric("brainstacks_preemptions_total") > 0
    for file in (server.store / "domains" / "broken").iterdir():
        file.unlink()
    assert status_of_chat(server, model="tiny:broken") == 503


def status_of_chat(server: ServerProcess, **fields: Any) -> int:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **fields}
    return server.http.post("/v1/chat/completions", json=body).status_code


def filled(expression: str) -> str:
    """With a dashboard's variables replaced."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def dashboard_queries() -> list[tuple[str, str]]:
    """Title of the panel and expression, of all."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], filled(target["expr"])) for panel in panels for target in panel.get("targets", [])]


def test_no_panel_of_the_dashboard_is_empty(prometheus: PrometheusProcess) -> None:
    empty = [
        (title, expression)
        for title, expression in dashboard_queries()
        if not any(math.isfinite(value) for value in prometheus.values(expression.replace(FALLBACK, "")))
    ]
    assert not empty


def test_the_dashboard_leaves_no_variable_unfilled() -> None:
    assert [expression for _, expression in dashboard_queries() if re.search(r"\$\w|\$\{", expression)] == []


def test_every_metric_of_the_server_that_alerts_name_is_there(prometheus: PrometheusProcess) -> None:
    groups = yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        selectors = re.findall(r"\b((?:brainstacks|process)_\w+|up\b)(\{[^}]*\})?", rule["expr"])
        assert selectors, rule["alert"]
        for name, labels in selectors:
            # Which answers come, and from which endpoints, is the traffic's; names and other labels are the server's.
            labels = re.sub(r'(status|endpoint)(=|=~|!~|!=)"[^"]*",?', r'\1!="",', labels)
            assert prometheus.values(f"count({name}{labels})"), (rule["alert"], name + labels)


def test_alerts_evaluate_and_those_of_this_traffic_are_seen(prometheus: PrometheusProcess) -> None:
    ends = time.monotonic() + SECONDS_TO_SHOW
    while True:
        groups = prometheus.ask("/rules", type="alert")["groups"]
        states = {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}
        health = {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]}
        if states["BrainstacksLoadFailures"] == "firing":
            break
        assert time.monotonic() < ends, (states, health)
        time.sleep(0.2)
    assert {verdict for verdict, _ in health.values()} == {"ok"}, health
    seen = {name for name, state in states.items() if state != "inactive"}
    assert seen >= {"BrainstacksLoadFailures", "BrainstacksErrors", "BrainstacksRefusing", "BrainstacksCapabilityGaps"}
    assert not seen & {"BrainstacksDown", "BrainstacksNotReady", "BrainstacksEngineSilent", "BrainstacksRestarting"}
