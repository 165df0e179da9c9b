"""The admin API over a running server: keys, registration, deletion, residency, routers."""

import asyncio
import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from engine.slots import ResidentDomain
from router.errors import CheckpointInvalid
from server.access import AdminRoute, ApiRoute
from server.admin_schemas import FileSource
from server.catalog import Catalog, Versions
from server.metrics import ServerMetrics
from server.ports import RouterPort
from server.routes import admin, openai
from server.routing import Routing
from server.sources import Sources
from server.store_admin import StoreAdmin
from stack_store.cache import ResidentCache
from stack_store.integrity import IntegrityCheck
from stack_store.uploads import BlobStore
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.integration.server.conftest import ADMIN_KEY
from tests.integration.server.test_lifecycle import asked, assert_nothing_is_left, is_decoding, read_answer
from tests.servers import (
    ANSWER,
    WAIT_SECONDS,
    LiveServer,
    ScriptedRouter,
    make_downloads,
    make_store,
    run_live_server,
    wait_until,
)


@pytest.fixture
def api(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client(ADMIN_KEY) as client:
        yield client


def law_file(server: LiveServer, *, round: int = 1, seed: int = 9) -> Path:
    """A new stack under the import root."""
    path = server.import_root / f"law-{round}-{seed}.safetensors"
    write_random_stack(path, tiny_header(domain="law", round=round), seed=seed)
    return path


def put_law(api: httpx.Client, *files: Path, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """Registers the domain law by path."""
    body = {"stacks": [{"path": file.name} for file in files], **fields}
    return api.put("/admin/domains/law", json=body, headers=headers)


def upload(api: httpx.Client, content: bytes) -> str:
    """Its digest."""
    digest = hashlib.sha256(content).hexdigest()
    assert api.put(f"/admin/blobs/{digest}", content=content).json() == {"sha256": digest, "bytes": len(content)}
    return digest


def test_every_admin_route_asks_for_the_admin_key(server: LiveServer) -> None:
    with server.client() as anyone, server.client("wrong") as guesser:
        paths = anyone.get("/openapi.json").json()["paths"]
        calls = [(method, path) for path in paths if path.startswith("/admin") for method in paths[path]]
        assert len(calls) >= 8
        for method, path in calls:
            path = path.format(name="math", action="pin", sha256="0" * 64)
            for client in (anyone, guesser):
                response = client.request(method, path, content=b"{", headers={"content-type": "application/json"})
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["code"] == "invalid_api_key"


def test_no_route_was_added_without_a_guard(server: LiveServer) -> None:
    assert all(isinstance(route, AdminRoute) for route in admin.router.routes)
    assert all(isinstance(route, ApiRoute) for route in openai.router.routes)
    with server.client() as client:
        open_paths = {"/health", "/health/live", "/health/ready", "/metrics"}
        routes = (*admin.router.routes, *openai.router.routes)
        guarded = {getattr(route, "path", "").replace(":path}", "}") for route in routes}
        assert set(client.get("/openapi.json").json()["paths"]) == open_paths | guarded


def test_api_key_does_not_open_the_admin_door(tmp_path: Path) -> None:
    settings = {"server": {"api_keys": ["user"], "admin_key": "boss"}}
    with run_live_server(tmp_path, settings=settings) as server, server.client("user") as client:
        assert client.get("/admin/domains").status_code == 401
        assert client.get("/v1/models").status_code == 200


def test_admin_is_off_without_a_key(tmp_path: Path) -> None:
    with run_live_server(tmp_path) as server, server.client("guess") as client:
        response = client.get("/admin/domains")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_disabled")


def test_domains_are_listed_with_what_is_resident(server: LiveServer, api: httpx.Client) -> None:
    server.chat(model="tiny:math")
    response = api.get("/admin/domains")
    shown = {domain["name"]: domain for domain in response.json()["domains"]}
    assert list(shown) == ["chat", "code", "math"]
    assert (shown["math"]["state"], shown["code"]["state"]) == ("resident", "absent")
    assert shown["math"]["resident_bytes"] == server.resident_bytes("math")
    assert response.headers["etag"] == f'"{response.json()["generation"]}"'
    one = api.get("/admin/domains/math").json()
    assert one["version"] == server.registry.domain("math").version
    assert api.get("/admin/domains/law").json()["error"]["code"] == "domain_not_found"


def test_domain_registered_while_requests_run_answers_the_next(server: LiveServer, api: httpx.Client) -> None:
    server.engine.may_decode.clear()
    with asked(server):
        wait_until(is_decoding(server), what="a request runs")
        response = put_law(api, law_file(server))
        assert (response.status_code, response.json()["changed"]) == (201, True)
        server.engine.may_decode.set()
        assert server.chat(model="tiny:law").json()["brainstacks"]["mix"] == {"law": 1.0}
    assert "tiny:law" in [model["id"] for model in api.get("/v1/models").json()["data"]]


def test_same_registration_again_changes_nothing(server: LiveServer, api: httpx.Client) -> None:
    file = law_file(server)
    first, second = put_law(api, file), put_law(api, file)
    assert (second.status_code, second.json()["changed"]) == (200, False)
    assert second.json()["generation"] == first.json()["generation"]


def test_dry_run_checks_and_changes_nothing(server: LiveServer, api: httpx.Client) -> None:
    before = api.get("/admin/domains").json()
    assert put_law(api, law_file(server), dry_run=True).status_code == 200
    assert api.get("/admin/domains").json() == before
    assert put_law(api, law_file(server, round=2), dry_run=True).status_code == 400


def test_registration_by_upload(server: LiveServer, api: httpx.Client) -> None:
    body = {"stacks": [{"sha256": upload(api, law_file(server).read_bytes())}]}
    assert api.put("/admin/domains/law", json=body).status_code == 201
    assert list((server.registry.path / "uploads").iterdir()) == []
    again = api.put("/admin/domains/law", json=body)
    assert (again.status_code, again.json()["changed"]) == (200, False)


def test_upload_with_another_digest_is_refused_and_not_kept(server: LiveServer, api: httpx.Client) -> None:
    response = api.put(f"/admin/blobs/{'0' * 64}", content=b"something else")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "digest_mismatch")
    body = {"stacks": [{"sha256": "0" * 64}]}
    assert api.put("/admin/domains/law", json=body).json()["error"]["code"] == "upload_not_found"
    assert list((server.registry.path / "uploads").iterdir()) == []


def test_upload_name_must_be_a_digest(api: httpx.Client) -> None:
    assert api.put("/admin/blobs/..%2Fmanifest.json", content=b"x").status_code in (400, 404)
    assert api.put("/admin/blobs/short", content=b"x").json()["error"]["param"] == "sha256"


def test_upload_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    settings = {"server": {"admin_key": "k", "max_upload_bytes": 1000, "max_body_bytes": 10}}
    with run_live_server(tmp_path, settings=settings) as server, server.client("k") as client:
        content = b"x" * 1001
        digest = hashlib.sha256(content).hexdigest()
        assert client.put(f"/admin/blobs/{digest}", content=content).status_code == 413
        assert upload(client, b"x" * 1000)


def test_bad_files_are_refused_by_name_and_change_nothing(server: LiveServer, api: httpx.Client) -> None:
    good = law_file(server)
    (server.import_root / "pickle.safetensors").write_bytes(b"\x80\x04\x95junk")
    (server.import_root / "short.safetensors").write_bytes(good.read_bytes()[:-10])
    write_random_stack(server.import_root / "foreign.safetensors", tiny_header(domain="law", base_fingerprint="other"))
    wide = tiny_header(domain="law", geometry=tiny_geometry(hidden=16))
    write_random_stack(server.import_root / "wide.safetensors", wide)
    (server.import_root / "link.safetensors").symlink_to("/etc/passwd")
    before = api.get("/admin/domains").json()
    for name, code in (
        ("pickle.safetensors", "stack_invalid"),
        ("short.safetensors", "stack_invalid"),
        ("foreign.safetensors", "stack_incompatible"),
        ("wide.safetensors", "stack_incompatible"),
        ("math.safetensors", "domain_invalid"),
        ("link.safetensors", "import_refused"),
        ("../store/manifest.json", "import_refused"),
        ("/etc/passwd", "import_refused"),
        ("missing.safetensors", "import_refused"),
    ):
        response = api.put("/admin/domains/law", json={"stacks": [{"path": name}]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, code), name
    assert api.get("/admin/domains").json() == before


@pytest.mark.parametrize("name", ["Law", "base", "all", "a" * 65, "l.w"])
def test_bad_domain_names_are_refused(server: LiveServer, api: httpx.Client, name: str) -> None:
    response = api.put(f"/admin/domains/{name}", json={"stacks": [{"path": law_file(server).name}]})
    assert response.json()["error"]["code"] == "domain_name_invalid"


@pytest.mark.parametrize(
    "body",
    [
        {"stacks": []},
        {"stacks": [{}]},
        {"stacks": [{"path": "a", "sha256": "0" * 64}]},
        {"stacks": [{"path": "a"}], "dryrun": True},
        {"stacks": [{"path": "a", "pathh": "b"}]},
    ],
)
def test_mistyped_registration_is_refused(api: httpx.Client, body: dict[str, Any]) -> None:
    assert api.put("/admin/domains/law", json=body).status_code == 400


def test_paths_need_an_import_root(tmp_path: Path) -> None:
    settings = {"server": {"admin_key": "k"}}
    with run_live_server(tmp_path, settings=settings, has_import_root=False) as server, server.client("k") as client:
        response = put_law(client, law_file(server))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "import_disabled")


def test_domain_larger_than_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    settings = {"server": {"admin_key": "k"}}
    with run_live_server(tmp_path, budget_domains=1.5, settings=settings) as server, server.client("k") as client:
        response = put_law(client, law_file(server), law_file(server, round=2))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "domain_too_large")
        message = response.json()["error"]["message"]
        assert str(2 * server.resident_bytes("math")) in message
        assert str(server.cache.snapshot().budget_bytes) in message


def test_if_match_guards_against_changes_in_between(server: LiveServer, api: httpx.Client) -> None:
    seen = api.get("/admin/domains").headers["etag"]
    assert put_law(api, law_file(server), headers={"if-match": seen}).status_code == 201
    for response in (
        put_law(api, law_file(server, seed=10), headers={"if-match": seen}),
        api.delete("/admin/domains/law", headers={"if-match": seen}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (412, "generation_conflict")
        assert response.headers["x-should-retry"] == "false"
    for odd in ("latest", "9" * 5000):
        assert put_law(api, law_file(server), headers={"if-match": odd}).json()["error"]["param"] == "If-Match"
    assert api.delete("/admin/domains/law", headers={"if-match": "*"}).status_code == 200


def test_idle_domain_is_deleted_at_once(server: LiveServer, api: httpx.Client) -> None:
    server.chat(model="tiny:math")
    size = server.resident_bytes("math")
    file = server.registry.stack_path(server.registry.domain("math").stacks[0])
    assert api.delete("/admin/domains/math").json()["freed_bytes"] == size
    assert not file.exists()
    assert server.cache.snapshot().resident_bytes == 0
    assert server.chat(model="tiny:math").status_code == 404
    assert api.delete("/admin/domains/math").status_code == 404


def test_deleted_domain_lets_its_requests_finish(server: LiveServer, api: httpx.Client) -> None:
    server.engine.may_decode.clear()
    file = server.registry.stack_path(server.registry.domain("math").stacks[0])
    with asked(server, model="tiny:math") as connection:
        wait_until(is_decoding(server), what="math answers")
        assert api.delete("/admin/domains/math").json()["status"] == "draining"
        assert server.chat(model="tiny:math").status_code == 404
        assert file.exists()
        server.engine.may_decode.set()
        assert read_answer(connection)["brainstacks"]["mix"] == {"math": 1.0}
    wait_until(lambda: not file.exists(), what="the file is gone")
    assert_nothing_is_left(server)
    assert [entry.key for entry in server.cache.snapshot().entries] == []


def test_domain_deleted_during_the_route_is_left_out(server: LiveServer, api: httpx.Client) -> None:
    server.engine.may_route.clear()
    with asked(server, "math=0.9") as connection:
        wait_until(lambda: server.service.admission.admitted == 1, what="the request is admitted")
        api.delete("/admin/domains/math")
        server.engine.may_route.set()
        report = read_answer(connection)["brainstacks"]
    assert (report["mix"], report["scores"]["math"]) == ({"chat": 0.2}, 0.9)


def test_deletion_while_its_files_load_is_survived(server: LiveServer, api: httpx.Client) -> None:
    server.may_load.clear()
    with asked(server, model="tiny:math") as connection:
        wait_until(lambda: len(server.cache.snapshot().entries) == 1, what="math loads")
        assert api.delete("/admin/domains/math").json()["status"] == "draining"
        server.may_load.set()
        assert read_answer(connection)["brainstacks"]["cold"] == ["math"]
    assert_nothing_is_left(server)


def test_replaced_version_finishes_its_requests_and_the_next_use_the_new(server: LiveServer, api: httpx.Client) -> None:
    put_law(api, law_file(server))
    server.engine.may_decode.clear()
    old = server.registry.domain("law")
    with asked(server, model="tiny:law") as connection:
        wait_until(is_decoding(server), what="law answers")
        response = put_law(api, law_file(server, seed=10))
        assert (response.status_code, response.json()["changed"]) == (200, True)
        server.engine.may_decode.set()
        assert read_answer(connection)["choices"][0]["message"]["content"] == ANSWER
    server.chat(model="tiny:law")
    used = [request.mix[0][0].version for request in server.engine.submitted]
    assert used == [old.version, server.registry.domain("law").version]
    wait_until(lambda: not server.registry.stack_path(old.stacks[0]).exists(), what="the old file is gone")
    assert [entry.key for entry in server.cache.snapshot().entries] == [f"law@{used[1]}"]


def test_deleted_and_registered_again_it_is_the_same_domain(server: LiveServer, api: httpx.Client) -> None:
    file = law_file(server)
    put_law(api, file)
    server.engine.may_decode.clear()
    with asked(server, model="tiny:law"):
        wait_until(is_decoding(server), what="law answers")
        assert api.delete("/admin/domains/law").json()["status"] == "draining"
        assert put_law(api, file).status_code == 201
        server.engine.may_decode.set()
    assert_nothing_is_left(server)
    assert server.chat(model="tiny:law").status_code == 200
    assert server.registry.stack_path(server.registry.domain("law").stacks[0]).exists()


def test_pinned_domain_is_not_evicted_until_unpinned(tmp_path: Path) -> None:
    settings = {"server": {"admin_key": "k"}}
    with run_live_server(tmp_path, budget_domains=2, settings=settings) as server, server.client("k") as client:
        pinned = client.post("/admin/domains/math/pin").json()
        assert (pinned["state"], pinned["pinned"], pinned["leases"]) == ("resident", True, 0)
        for domain in ("chat", "code", "chat"):
            server.chat(model=f"tiny:{domain}")
        assert client.get("/admin/domains/math").json()["state"] == "resident"
        assert client.post("/admin/domains/math/unpin").json()["pinned"] is False
        for domain in ("code", "chat"):
            server.chat(model=f"tiny:{domain}")
        assert client.get("/admin/domains/math").json()["state"] == "absent"


def test_pin_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    settings = {"server": {"admin_key": "k"}}
    with run_live_server(tmp_path, budget_domains=1, settings=settings) as server, server.client("k") as client:
        assert client.post("/admin/domains/math/pin").status_code == 200
        assert client.post("/admin/domains/code/pin").json()["error"]["code"] == "mix_too_large"


def test_new_version_of_a_pinned_domain_is_pinned(server: LiveServer, api: httpx.Client) -> None:
    put_law(api, law_file(server))
    api.post("/admin/domains/law/pin")
    put_law(api, law_file(server, seed=10))
    wait_until(lambda: api.get("/admin/domains/law").json()["state"] == "resident", what="the new version is loaded")
    assert api.get("/admin/domains/law").json()["pinned"] is True
    assert len(server.cache.snapshot().entries) == 1


def test_prefetched_domain_is_not_cold(server: LiveServer, api: httpx.Client) -> None:
    assert api.post("/admin/domains/math/prefetch").status_code == 200
    wait_until(lambda: api.get("/admin/domains/math").json()["state"] == "resident", what="math is resident")
    assert server.chat(model="tiny:math").json()["brainstacks"]["cold"] == []
    assert api.post("/admin/domains/math/evict").status_code == 400
    assert api.post("/admin/domains/law/prefetch").status_code == 404


def test_what_the_router_knows_of_each_domain_is_shown(server: LiveServer, api: httpx.Client) -> None:
    """A domain that it does not know is served when a request names it, and never by route."""
    put_law(api, law_file(server))
    trained = {name: tuple(s.digest for s in server.registry.domain(name).stacks) for name in ("chat", "math")}
    server.router.stack_digests = trained | {"code": ("0" * 64,), "gone": ("1" * 64,)}
    listed = api.get("/admin/domains").json()
    known = {domain["name"]: domain["router"] for domain in listed["domains"]}
    assert known == {"chat": "trained", "math": "trained", "code": "stale", "law": "unknown"}
    answer = server.chat("law=0.9", model="tiny:law").json()["brainstacks"]
    assert (answer["mix"], answer["scores"]) == ({"law": 1.0}, {})


def test_a_route_by_a_router_of_other_stacks_says_so(server: LiveServer, api: httpx.Client) -> None:
    assert "stale" not in server.chat("math=0.9").json()["brainstacks"]
    server.router.stack_digests = {"math": ("0" * 64,)}
    put_law(api, law_file(server))  # a change of the store, after which its fit is looked at again
    assert server.chat("math=0.8").json()["brainstacks"]["stale"] == ["math"]
    with server.client() as client:
        assert client.post("/v1/route", json={"prompt": "math=0.8"}).json()["stale"] == ["math"]
    assert server.metric("brainstacks_router_stale_domains") == 1
    explicit = server.chat(model="tiny:math").json()["brainstacks"]
    assert "stale" not in explicit  # nobody asked the router
    listed = api.get("/admin/domains").json()["domains"]
    assert [domain["router"] for domain in listed if domain["name"] == "math"] == ["stale"]


def test_without_a_host_tier_nothing_can_be_pinned_in_it(server: LiveServer, api: httpx.Client) -> None:
    for action in ("pin", "unpin", "prefetch"):
        refused = api.post(f"/admin/domains/math/{action}?tier=host")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tier")
    assert api.post("/admin/domains/math/pin?tier=shelf").status_code == 400
    assert api.post("/admin/domains/math/pin?tier=device").json()["pinned"] is True
    assert api.get("/admin/cache").json()["host"] is None


def test_cache_is_shown(server: LiveServer, api: httpx.Client) -> None:
    server.chat(model="tiny:math")
    wait_until(lambda: server.cache.snapshot().leased_bytes == 0, what="the lease ended")
    shown = api.get("/admin/cache").json()
    assert shown["resident_bytes"] == server.resident_bytes("math")
    assert shown["budget_bytes"] == 3 * shown["resident_bytes"]
    assert [entry["state"] for entry in shown["entries"]] == ["resident"]


def test_router_is_swapped_live_and_for_good(server: LiveServer, api: httpx.Client) -> None:
    file = law_file(server)  # any sound safetensors file; the stand-in loader looks up what it stands for
    server.routers[file.read_bytes()[-8:].hex()] = ScriptedRouter(("code",))
    server.chat("code=0.9")
    response = api.put("/admin/router", json={"path": file.name})
    assert response.status_code == 200, response.text
    assert response.json()["router"]["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert server.chat("code=0.9").json()["brainstacks"]["scores"] == {"code": 0.9}
    by_upload = api.put("/admin/router", json={"sha256": upload(api, file.read_bytes())})
    assert by_upload.json()["generation"] == response.json()["generation"]
    assert list((server.registry.path / "uploads").iterdir()) == []


def test_same_router_by_digest_again_succeeds(server: LiveServer, api: httpx.Client) -> None:
    file = law_file(server)
    server.routers[file.read_bytes()[-8:].hex()] = ScriptedRouter(("code",))
    body = {"sha256": upload(api, file.read_bytes())}
    first, second = api.put("/admin/router", json=body), api.put("/admin/router", json=body)
    assert (second.status_code, second.json()) == (200, first.json())
    other = api.put("/admin/router", json={"sha256": "0" * 64})
    assert other.json()["error"]["code"] == "upload_not_found"


def test_imported_router_that_is_refused_leaves_no_copy(server: LiveServer, api: httpx.Client) -> None:
    def refuse_it(path: Path) -> ScriptedRouter:
        raise CheckpointInvalid(f"router file {path} is odd")

    server.service.routing._load_router = refuse_it
    response = api.put("/admin/router", json={"path": law_file(server).name})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "router_invalid")
    assert str(server.registry.path) not in response.text
    assert list((server.registry.path / "uploads").iterdir()) == []


def test_refused_upload_is_named_without_its_place(server: LiveServer, api: httpx.Client) -> None:
    digest = upload(api, b"\x80\x04\x95junk")
    response = api.put("/admin/domains/law", json={"stacks": [{"sha256": digest}]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "stack_invalid")
    assert digest in response.json()["error"]["message"]
    assert str(server.registry.path) not in response.text


def test_client_who_hangs_up_during_an_upload_leaves_nothing(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    address = urlsplit(server.url)
    head = f"PUT /admin/blobs/{'0' * 64} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ADMIN_KEY}\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(head.encode() + b"content-length: 1000\r\n\r\nhalf")
        wait_until(lambda: any((server.registry.path / "uploads").glob("*")), what="the upload has begun")
    labels = {"endpoint": "/admin/blobs/{sha256}", "status": "499"}
    sample = server.service.metrics.registry.get_sample_value
    wait_until(lambda: sample("brainstacks_requests_total", labels) == 1, what="the request has ended")
    assert list((server.registry.path / "uploads").iterdir()) == []
    assert "Traceback" not in caplog.text


def test_live_router_is_the_one_that_was_written_last(tmp_path: Path) -> None:
    """The second change begins when the first is complete, in memory too."""
    steps: list[str] = []
    second_began = threading.Event()

    class WatchedRouting(Routing):
        def swap(self, router: RouterPort) -> None:
            steps.append("swap")
            super().swap(router)

    def load(path: Path) -> ScriptedRouter:
        steps.append("load")
        if len(steps) > 1:
            second_began.set()
        second_began.wait(0.2)
        return ScriptedRouter()

    async def set_two_routers() -> None:
        registry = make_store(tmp_path / "store", tmp_path / "import")
        submit: Any = None
        routing = WatchedRouting(submit, load_router=load, router=None)
        cache = ResidentCache[ResidentDomain](budget_bytes=1, load=load_nothing)
        catalog = Catalog(registry, cache, Versions(), dtype=torch.float32, lease_timeout_seconds=60)
        blobs = BlobStore(tmp_path / "store" / "uploads", max_bytes=10**6)
        sources = Sources(registry, blobs, import_root=tmp_path / "import")
        metrics = ServerMetrics(version="0", base="tiny")
        downloads = make_downloads(sources, metrics)
        integrity = IntegrityCheck(registry, metrics, bytes_per_second=0, interval_seconds=0)
        store_admin = StoreAdmin(catalog, routing, sources, downloads, integrity, budget_bytes=1)
        await asyncio.gather(
            *(
                store_admin.set_router(FileSource(path=f"{domain}.safetensors"), expected_generation=None)
                for domain in ("math", "code")
            )
        )

    asyncio.run(set_two_routers())
    assert steps == ["load", "swap"] * 2


def load_nothing(key: str) -> ResidentDomain:
    raise AssertionError("no domain is loaded here")
