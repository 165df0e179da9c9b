"""Who answers: the router, the request, or the model's name."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server.conftest import ADMIN_KEY
from tests.servers import LiveServer, run_live_server, wait_until


def submitted_mix(server: LiveServer) -> dict[str, float]:
    """The mix that the engine got with its latest request."""
    return {domain.name: weight for domain, weight in server.engine.submitted[-1].mix}


def is_resident(server: LiveServer, *domains: str) -> bool:
    """Whether all these domains are in memory."""
    entries = server.cache.snapshot().entries
    return set(domains) <= {entry.key.partition("@")[0] for entry in entries if entry.state != "loading"}


def test_router_decides_unless_told_otherwise(server: LiveServer) -> None:
    report = server.chat("math=0.9 code=0.12").json()["brainstacks"]
    assert submitted_mix(server) == report["mix"] == {"chat": 0.2, "math": 0.9}
    assert report["scores"] == {"chat": 0.01, "code": 0.12, "math": 0.9}


def test_routes_are_remembered_by_text(server: LiveServer) -> None:
    for _ in range(3):
        server.chat("math=0.9")
    server.chat("math=0.8")
    assert server.router.texts == ["math=0.9", "math=0.8"]


@pytest.mark.parametrize(
    ("fields", "mix"),
    [
        ({"brainstacks": {"mode": "base"}}, {}),
        ({"brainstacks": {"mode": "all"}}, {"chat": 1.0, "code": 1.0, "math": 1.0}),
        ({"brainstacks": {"mix": {"code": 0.4, "math": 1}}}, {"code": 0.4, "math": 1.0}),
        ({"brainstacks": {"mix": {"code": 0.4, "math": 0}}}, {"code": 0.4}),
        ({"brainstacks": {"mix": {}}}, {}),
        ({"model": "tiny:base"}, {}),
        ({"model": "tiny:code"}, {"code": 1.0}),
    ],
)
def test_request_decides_without_the_router(server: LiveServer, fields: dict[str, Any], mix: dict[str, float]) -> None:
    report = server.chat("math=0.9", **fields).json()["brainstacks"]
    assert submitted_mix(server) == report["mix"] == mix
    assert report["scores"] == {}
    assert server.router.texts == []


@pytest.mark.parametrize("weight", [0.5, 0])
def test_unknown_domain_in_a_mix_is_named(server: LiveServer, weight: float) -> None:
    response = server.chat(brainstacks={"mix": {"history": weight}})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "domain_not_found"
    assert "'history'" in response.json()["error"]["message"]


def test_expected_domains_load_while_the_router_reads(server: LiveServer) -> None:
    server.engine.may_route.clear()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.chat, "math=0.9", brainstacks={"expect": ["math", "code"]})
        wait_until(lambda: is_resident(server, "math", "code"), what="they are resident")
        assert server.router.texts == []
        server.engine.may_route.set()
        report = answer.result().json()["brainstacks"]
    assert report["mix"] == {"chat": 0.2, "math": 0.9}
    assert report["cold"] == ["chat"]
    wait_until(lambda: server.cache.snapshot().leased_bytes == 0, what="no byte is leased")


def test_domains_of_a_conversation_load_while_the_router_reads_its_next_message(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=2) as server:
        server.chat("math=0.9")
        server.chat("x", model="tiny:code")
        assert not is_resident(server, "math", "chat")
        server.engine.may_route.clear()
        turns = [("user", "math=0.9"), ("assistant", "2"), ("user", "math=0.8")]
        messages = [{"role": role, "content": content} for role, content in turns]
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.chat, messages=messages)
            wait_until(lambda: is_resident(server, "math", "chat"), what="they are resident")
            server.engine.may_route.set()
            assert answer.result().json()["brainstacks"]["cold"] == []


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"expect": ["history"]}, 404, "expects 'history', which is not a domain"),
        ({"expect": ["math"], "mode": "base"}, 400, "takes expect only where the router decides"),
        ({"expect": ["math"], "mix": {"math": 1}}, 400, "takes expect only where the router decides"),
    ],
)
def test_expectation_that_makes_no_sense_is_refused(
    server: LiveServer, fields: dict[str, Any], status: int, message: str
) -> None:
    response = server.chat(brainstacks=fields)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_model_and_extension_may_not_both_decide(server: LiveServer) -> None:
    response = server.chat(model="tiny:math", brainstacks={"mode": "base"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "brainstacks"


def test_domain_that_only_the_router_knows_is_scored_but_not_mixed(server: LiveServer) -> None:
    server.router.domains = ("chat", "law", "math")
    report = server.chat("law=0.9").json()["brainstacks"]
    assert report["scores"]["law"] == 0.9
    assert report["mix"] == {"chat": 0.2}


def test_empty_question_is_answered_by_the_base(server: LiveServer) -> None:
    assert server.chat(" ").json()["brainstacks"]["mix"] == {}


def test_store_without_a_router_answers_by_the_base_and_says_so_when_asked(tmp_path: Path) -> None:
    with run_live_server(tmp_path, has_router=False) as server:
        assert server.chat("math=0.9").json()["brainstacks"]["mix"] == {}
        with server.client() as client:
            response = client.post("/v1/route", json={"prompt": "hello"})
        assert response.json()["error"]["code"] == "router_not_found"


def test_routed_mix_shrinks_to_the_budget_and_tells(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=2) as server:
        response = server.chat("math=0.9 code=0.7")
        report = response.json()["brainstacks"]
    assert report["mix"] == {"code": 0.7, "math": 0.9}
    assert report["dropped"] == {"chat": 0.2}
    assert response.headers["x-brainstacks-mix"] == "code=0.70,math=0.90"


def test_routed_mix_makes_room_for_pins(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=2, settings={"server": {"admin_key": "k"}}) as server:
        with server.client("k") as client:
            assert client.post("/admin/domains/code/pin").json()["pinned"] is True
        report = server.chat("math=0.9").json()["brainstacks"]
    assert (report["mix"], report["dropped"]) == ({"math": 0.9}, {"chat": 0.2})


@pytest.mark.parametrize("extension", [{"mode": "all"}, {"mix": {"chat": 0.1, "code": 0.2, "math": 0.3}}])
def test_mix_of_the_request_does_not_shrink(tmp_path: Path, extension: dict[str, Any]) -> None:
    with run_live_server(tmp_path, budget_domains=2) as server:
        response = server.chat(brainstacks=extension)
        budget_bytes = server.cache.snapshot().budget_bytes
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "mix_too_large"
        assert str(budget_bytes) in response.json()["error"]["message"]


def test_second_question_of_a_kind_is_a_hit(server: LiveServer) -> None:
    assert sorted(server.chat("math=0.9").json()["brainstacks"]["cold"]) == ["chat", "math"]
    assert server.chat("math=0.8").json()["brainstacks"]["cold"] == []
    assert server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="hit") == 2
    assert server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="miss") == 2


def test_three_domains_take_turns_in_room_for_one(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=1) as server:
        for _ in range(2):
            for domain in ("math", "code", "chat"):
                server.chat(model=f"tiny:{domain}")
                assert submitted_mix(server) == {domain: 1.0}
        assert server.metric("brainstacks_stack_cache_evictions_total", tier="device") == 5
        file_bytes = sum(entry.stacks[0].bytes for entry in server.registry.manifest.domains)
        assert server.metric("brainstacks_stack_load_bytes_total", source="file") == 2 * file_bytes
        wait_until(lambda: server.cache.snapshot().leased_bytes == 0, what="every lease ended")
        server.cache.check_integrity()


def test_domain_whose_file_is_damaged_fails_alone(server: LiveServer) -> None:
    path = server.registry.stack_path(server.registry.domain("math").stacks[0])
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    failed = server.chat(model="tiny:math")
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == "load_failed"
    assert int(failed.headers["retry-after"]) > 0
    assert server.chat(model="tiny:code").status_code == 200


def test_domain_whose_file_is_gone_fails_alone(server: LiveServer) -> None:
    server.registry.stack_path(server.registry.domain("math").stacks[0]).unlink()
    assert server.chat(model="tiny:math").json()["error"]["code"] == "load_failed"
    assert server.chat(model="tiny:code").status_code == 200
    with server.client(ADMIN_KEY) as client:
        shown = {domain["name"]: domain["state"] for domain in client.get("/admin/domains").json()["domains"]}
    assert (shown["math"], shown["chat"]) == ("damaged", "absent")


def test_route_endpoint_generates_nothing(server: LiveServer) -> None:
    with server.client() as client:
        answer = client.post("/v1/route", json={"messages": [{"role": "user", "content": "math=0.9"}]}).json()
        gap = client.post("/v1/route", json={"prompt": "nothing known"}).json()
    assert answer["scores"] == {"chat": 0.01, "code": 0.01, "math": 0.9}
    assert (answer["mix"], answer["gap"]) == ({"chat": 0.2, "math": 0.9}, False)
    assert gap["gap"] is True
    assert answer["policy"] == {"floor_domain": "chat", "floor": 0.2, "threshold": 0.12, "gap_threshold": 0.12}
    assert server.engine.submitted == []


def test_gap_selection_and_weight_are_counted(server: LiveServer) -> None:
    server.chat("nothing known")
    server.chat("math=0.9")
    assert server.metric("brainstacks_capability_gap_total") == 1
    assert server.metric("brainstacks_domain_selected_total", domain="chat") == 2
    assert server.metric("brainstacks_domain_weight_sum", domain="math") == pytest.approx(0.9)


def test_a_load_that_takes_too_long_fails_only_those_that_wait_for_it_and_heals(tmp_path: Path) -> None:
    settings = {"store": {"lease_timeout_seconds": 0.3}}
    with run_live_server(tmp_path, settings=settings) as server:
        assert server.chat(model="tiny:chat").status_code == 200
        server.may_load.clear()
        with ThreadPoolExecutor(2) as pool:
            late = [pool.submit(server.chat, model="tiny:math") for _ in range(2)]
            assert server.chat(model="tiny:chat").status_code == 200
            assert server.chat(model="tiny:base").status_code == 200
        for response in (future.result() for future in late):
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert response.json()["error"]["code"] == "lease_timed_out"
            assert "['math'] was not resident within 0.3 seconds" in response.json()["error"]["message"]
        server.may_load.set()
        wait_until(lambda: is_resident(server, "math"), what="the load went on")
        assert server.chat(model="tiny:math").status_code == 200
        assert server.cache.snapshot().leased_bytes == 0
        server.cache.check_integrity()
