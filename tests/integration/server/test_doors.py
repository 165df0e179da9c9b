"""Who may come in: keys on every route of the app's own table, and pages of other origins."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from tests.servers import LiveServer, run_live_server

KEYS = {"api_keys": ["user-1", "user-2"], "admin_key": "boss"}
OPEN_PATHS = {"/health", "/health/live", "/health/ready", "/metrics", "/"}
PLACES = {"{name}": "math", "{action}": "pin", "{sha256}": "0" * 64, "{model:path}": "tiny"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with run_live_server(tmp_path_factory.mktemp("locked"), settings={"server": KEYS}) as server:
        yield server


def flattened(routes: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    """The table with the routes of included routers in it."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else flattened(included.routes)


def calls(server: LiveServer) -> list[tuple[str, str]]:
    """(method, path) of every route that the app has, filled in."""
    found = []
    for route in flattened(server.http.config.loaded_app.router.routes):
        if isinstance(route, APIRoute):
            path = route.path
            for name, value in PLACES.items():
                path = path.replace(name, value)
            assert "{" not in path, f"say what to put into {route.path}"
            found += [(method, path) for method in route.methods or ()]
    return found


def admin_calls(server: LiveServer) -> list[tuple[str, str]]:
    found = [(method, path) for method, path in calls(server) if path.startswith("/admin")]
    assert len(found) >= 8
    return found


@pytest.mark.parametrize("key", [None, "wrong", "user-1", "bos", "boss2", "Boss"])
def test_no_admin_route_opens_without_the_admin_key(locked: LiveServer, key: str | None) -> None:
    before = locked.registry.manifest
    with locked.client(key) as client:
        for method, path in admin_calls(locked):
            response = client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
    assert locked.registry.manifest == before


def test_admin_routes_are_off_without_an_admin_key_whatever_key_is_sent(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"api_keys": ["user"]}}) as server:
        for key in (None, "user", "None", "null"):
            with server.client(key) as client:
                for method, path in admin_calls(server):
                    response = client.request(method, path)
                    assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_disabled"), path


def test_every_other_route_but_the_open_ones_asks_for_an_api_key(locked: LiveServer) -> None:
    for key, is_let_in in ((None, False), ("boss", False), ("user-2", True)):
        with locked.client(key) as client:
            for method, path in calls(locked):
                if path.startswith("/admin"):
                    continue
                is_open = path in OPEN_PATHS
                refused = client.request(method, path).status_code == 401
                assert refused != (is_let_in or is_open), (method, path, key)


def test_key_beyond_ascii_opens_its_door(tmp_path: Path) -> None:
    key = "schlüssel-à"
    with run_live_server(tmp_path, settings={"server": {"api_keys": [key]}}) as server, server.client() as client:
        for sent, status in ((key, 200), ("schlüssel-", 401)):
            headers = {b"authorization": f"Bearer {sent}".encode()}
            assert client.get("/v1/models", headers=headers).status_code == status


def preflight(server: LiveServer, origin: str, method: str = "POST") -> dict[str, str]:
    """The headers of the answer to a browser that asks whether it may; `status` with them."""
    asks = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    }
    with server.client() as client:
        response = client.options("/v1/chat/completions", headers=asks)
    return {"status": str(response.status_code), **response.headers}


PAGE, FOREIGN = "https://app.example", "https://evil.example"


def test_pages_of_allowed_origins_may_ask_and_others_may_not(tmp_path: Path) -> None:
    settings = {"server": {**KEYS, "cors_origins": [PAGE]}}
    with run_live_server(tmp_path, settings=settings) as server:
        allowed, refused = preflight(server, PAGE), preflight(server, FOREIGN)
        assert (allowed["status"], allowed["access-control-allow-origin"]) == ("200", PAGE)
        assert "x-stainless-lang" in allowed["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed
        assert refused["status"] == "400"
        assert "access-control-allow-origin" not in refused
        assert preflight(server, PAGE, "TRACE")["status"] == "400"
        with server.client("user-1") as client:
            answer = client.get("/v1/models", headers={"origin": PAGE})
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "origin" in answer.headers["vary"].lower()
            assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": FOREIGN}).headers


def test_page_can_read_what_the_answer_says_beside_its_body(tmp_path: Path) -> None:
    settings = {"server": {"cors_origins": ["*"], "requests_per_minute": 100, "tokens_per_minute": 10_000}}
    with run_live_server(tmp_path, settings=settings) as server, server.client() as client:
        body = {"messages": [{"role": "user", "content": "math=0.9"}]}
        answer = client.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
        exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        told = {name for name in answer.headers if name.startswith("x-")}
        assert {"x-request-id", "x-brainstacks-mix", "x-ratelimit-remaining-tokens"} <= told <= exposed
        assert "retry-after" in exposed


def test_page_can_read_errors_too(tmp_path: Path) -> None:
    settings = {"server": {**KEYS, "cors_origins": [PAGE]}}
    with run_live_server(tmp_path, settings=settings) as server:
        server.engine.refuse_with = RuntimeError("broken")
        with server.client("user-1") as client:
            body = {"messages": [{"role": "user", "content": "hello"}]}
            failed = client.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
            locked_out = client.get("/admin/cache", headers={"origin": PAGE})
    assert (failed.status_code, locked_out.status_code) == (500, 401)
    for answer in (failed, locked_out):
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_no_page_may_ask_by_default(locked: LiveServer) -> None:
    assert preflight(locked, PAGE)["status"] == "405"
    with locked.client() as client:
        assert not [n for n in client.get("/health", headers={"origin": PAGE}).headers if n.startswith("access-c")]
