"""Health, metrics, ids and logs."""

import asyncio
import logging
import math
import re

import httpx
import pytest

from engine.errors import EngineFailed
from tests.integration.server.conftest import ADMIN_KEY
from tests.integration.server.test_lifecycle import asked, assert_nothing_is_left
from tests.servers import ANSWER, LiveServer, wait_until

CONTRACT = (
    "brainstacks_requests_total",
    "brainstacks_time_to_first_token_seconds",
    "brainstacks_inter_token_seconds",
    "brainstacks_phase_seconds",
    "brainstacks_prompt_tokens_total",
    "brainstacks_completion_tokens_total",
    "brainstacks_requests_running",
    "brainstacks_requests_waiting",
    "brainstacks_kv_cache_used_ratio",
    "brainstacks_stack_cache_lookups_total",
    "brainstacks_stack_cache_evictions_total",
    "brainstacks_stack_cache_resident_bytes",
    "brainstacks_stack_cache_process_bytes",
    "brainstacks_stack_cache_budget_bytes",
    "brainstacks_stack_load_seconds",
    "brainstacks_stack_load_bytes_total",
    "brainstacks_domain_selected_total",
    "brainstacks_domain_weight",
    "brainstacks_capability_gap_total",
    "brainstacks_build_info",
)


def scraped(server: LiveServer) -> str:
    """The text of /metrics."""
    with server.client() as client:
        return client.get("/metrics").text


def test_every_metric_of_the_contract_is_there(server: LiveServer) -> None:
    text = scraped(server)
    for name in CONTRACT:
        assert f"# TYPE {name} " in text, name


def test_an_answer_is_counted_and_timed(server: LiveServer) -> None:
    server.chat("math=0.9")
    num_tokens = len(ANSWER.encode())
    assert server.metric("brainstacks_requests_total", endpoint="/v1/chat/completions", status="200") == 1
    assert server.metric("brainstacks_completion_tokens_total") == num_tokens
    assert server.metric("brainstacks_prompt_tokens_total") == len("<|user|>math=0.9\n<|assistant|>")
    assert server.metric("brainstacks_time_to_first_token_seconds_count") == 1
    assert server.metric("brainstacks_inter_token_seconds_count") == num_tokens - 1
    for phase in ("queue", "route", "page_in", "prefill", "decode"):
        assert server.metric("brainstacks_phase_seconds_count", phase=phase) == 1


def test_running_and_waiting_follow_the_engine(server: LiveServer) -> None:
    server.engine.may_run.clear()
    with asked(server, n=2):
        wait_until(lambda: server.engine.snapshot().running == 2, what="both choices are in the batch")
        server.engine.may_route.clear()
        with asked(server, "code=0.9", n=3):
            wait_until(lambda: server.service.admission.admitted == 5, what="the second request is admitted")
            text = scraped(server)
    server.engine.may_route.set()
    assert "brainstacks_requests_running 2.0" in text
    assert "brainstacks_requests_waiting 3.0" in text
    assert "brainstacks_kv_cache_used_ratio 0.25" in text
    assert "brainstacks_preemptions_total 3.0" in text
    assert_nothing_is_left(server)
    assert "brainstacks_requests_running 0.0" in scraped(server)
    assert "brainstacks_requests_waiting 0.0" in scraped(server)


def test_endpoint_labels_are_templates(server: LiveServer) -> None:
    with server.client() as client:
        client.get("/v1/models/some-model")
        client.get("/some/path")
    assert server.metric("brainstacks_requests_total", endpoint="/v1/models/{model:path}", status="404") == 1
    assert server.metric("brainstacks_requests_total", endpoint="other", status="404") == 1


def test_readiness_follows_the_heartbeat_of_the_engine(server: LiveServer) -> None:
    with server.client() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/health").status_code == 200
        server.engine.heartbeat_age = 1000.0
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200


def test_engine_whose_loop_has_ended_is_not_ready(server: LiveServer) -> None:
    server.engine.heartbeat_age = math.inf

    async def ask_the_app() -> httpx.Response:  # its HTTP server may have left already
        transport = httpx.ASGITransport(server.http.config.loaded_app)
        async with httpx.AsyncClient(transport=transport, base_url=server.url) as client:
            return await client.get("/health/ready")

    response = asyncio.run(ask_the_app())
    assert (response.status_code, response.json()["heartbeat_age_seconds"]) == (503, None)


def test_request_id_is_made_or_taken_over(server: LiveServer) -> None:
    with server.client() as client:
        made = [client.get("/health/live").headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        taken = client.get("/health/live", headers={"x-request-id": "trace-1"})
        assert taken.headers["x-request-id"] == "trace-1"
        refused = client.get("/health/live", headers={"x-request-id": "a b"})
        assert refused.headers["x-request-id"] != "a b"


def test_one_line_tells_of_a_request_and_never_its_text(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.chat("a private question math=0.9")
    wait_until(lambda: "request done" in caplog.text, what="the line is written")
    lines = [record.getMessage() for record in caplog.records if "request done" in record.getMessage()]
    assert len(lines) == 1
    assert re.search(r"status=200 seconds=\S+ mix=chat=0.20,math=0.90 prompt_tokens=\d+ completion_tokens=13", lines[0])
    assert "private question" not in caplog.text
    assert "au lait" not in caplog.text


def test_who_tries_admin_keys_is_logged(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """Pages look at the cache every second; who is refused there is another matter."""
    caplog.set_level(logging.INFO)
    for key, status in ((ADMIN_KEY, 200), ("guess", 401)):
        with server.client(key) as client:
            assert client.get("/admin/cache").status_code == status
    wait_until(lambda: "request done" in caplog.text, what="a line is written")
    (line,) = [record.getMessage() for record in caplog.records if "request done" in record.getMessage()]
    assert "endpoint=/admin/cache status=401" in line


def test_no_failure_tells_a_text_either(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secret = "a private question"
    statuses = [server.chat(secret * 50).status_code, server.chat(secret, model="none").status_code]
    statuses.append(server.chat(secret, temperature=9).status_code)
    server.engine.refuse_with = RuntimeError("broken")
    statuses.append(server.chat(secret).status_code)
    server.engine.refuse_with, server.engine.fail_with = None, EngineFailed("a step failed")
    statuses += [server.chat(secret).status_code, server.chat(secret, stream=True).status_code]
    assert statuses == [400, 404, 400, 500, 500, 200]
    wait_until(lambda: caplog.text.count("request done") == 6, what="every line is written")
    assert caplog.text.count("Traceback") == 3
    assert "private question" not in caplog.text
    assert "au lait" not in caplog.text


def test_models_are_found_by_their_names(server: LiveServer) -> None:
    with server.client() as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", "tiny:base", "tiny:chat", "tiny:code", "tiny:math"]
        for name in names:
            assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert client.get("/v1/models/tiny:law").json()["error"]["code"] == "model_not_found"
