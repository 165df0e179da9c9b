"""The real parts put together: a tiny random base, trained nothing, on a store that is made at the first start."""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch

from engine.model.base import Base, load_base
from engine.model.moe_lora import MoeLoraConfig
from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings
from router.network import MetaRouter
from router.policy import RoutingPolicy
from server.compose import compose_app_for
from server.config import Settings, load_settings
from server.errors import ConfigInvalid
from stack_store.errors import StackIncompatible
from stack_store.format import pack_groups, write_stack
from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry
from tests.servers import serve_app
from tests.stacks import header_for, random_projections

CONFIG = MoeLoraConfig(num_experts=4, rank=4, top_k=2, alpha=8.0)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="float32", device="cpu")


def settings_for(folder: Path, **engine: object) -> Settings:
    """Small, with an admin key and an import root."""
    return load_settings(
        flags={
            "server": {"admin_key": "k", "served_model_name": "tiny"},
            "engine": {"max_model_len": 256, "kv_cache_tokens": 1024, **engine},
            "store": {"path": folder / "store", "import_root": folder, "device_budget_bytes": 10**8},
        }
    )


def write_domain(folder: Path, base: Base, domain: str, *, seed: int) -> str:
    """A stack that changes what the base says; its file name."""
    header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=domain)
    weights = random_projections(base.geometry, CONFIG, seed=seed)
    write_stack(folder / f"{domain}.safetensors", header, pack_groups(header, weights))
    return f"{domain}.safetensors"


def write_router(
    folder: Path,
    base: Base,
    domains: tuple[str, ...],
    *,
    mid_layer: int = 1,
    token_dim: int | None = None,
    digests: Mapping[str, tuple[str, ...]] | None = None,
) -> str:
    """An untrained router; its file name."""
    torch.manual_seed(0)
    checkpoint = RouterCheckpoint(
        network=MetaRouter(token_dim or base.hidden_size, domains, hidden_dim=16),
        settings=FeatureSettings(mid_layer=mid_layer),
        policy=RoutingPolicy(),
        stack_digests=dict.fromkeys(domains, ()) if digests is None else digests,
        base_fingerprint=base.fingerprint,
    )
    checkpoint.save(folder / "router.safetensors")
    return "router.safetensors"


def ask(client: httpx.Client, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_registered_domains_and_router_answer_at_once_and_after_a_restart(tmp_path: Path, base: Base) -> None:
    settings = settings_for(tmp_path)
    with serve_app(compose_app_for(base, settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.headers["authorization"] = "Bearer k"
        alone = ask(client).json()
        assert alone["brainstacks"]["mix"] == {}
        for seed, domain in enumerate(("chat", "math")):
            body = {"stacks": [{"path": write_domain(tmp_path, base, domain, seed=seed)}]}
            assert client.put(f"/admin/domains/{domain}", json=body).status_code == 201
        forced = ask(client, model="tiny:math").json()
        assert forced["choices"][0]["message"] != alone["choices"][0]["message"]
        assert client.put("/admin/router", json={"path": write_router(tmp_path, base, ("chat", "math"))}).is_success
        routed = ask(client).json()
        assert set(routed["brainstacks"]["scores"]) == {"chat", "math"}
        assert set(routed["brainstacks"]["mix"]) == {"chat", "math"}  # untrained, it finds every domain likely
        assert ask(client, model="tiny:base").json()["choices"] == alone["choices"]
    with serve_app(compose_app_for(base, settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert ask(client).json()["choices"] == routed["choices"]


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path, base: Base) -> None:
    (tmp_path / "file").touch()
    settings = settings_for(tmp_path / "file")
    with pytest.raises(ConfigInvalid, match=re.escape(f"store.path: no store can be made in '{tmp_path}/file/store'")):
        compose_app_for(base, settings)


def test_on_a_cpu_domains_take_memory_of_the_process(tmp_path: Path, base: Base) -> None:
    with serve_app(compose_app_for(base, settings_for(tmp_path))) as url, httpx.Client(base_url=url) as client:
        client.headers["authorization"] = "Bearer k"
        body = {"stacks": [{"path": write_domain(tmp_path, base, "math", seed=0)}]}
        client.put("/admin/domains/math", json=body).raise_for_status()
        num_bytes = client.post("/admin/domains/math/pin").json()["resident_bytes"]
        metrics = client.get("/metrics").text
    assert float(re.findall(r"^brainstacks_stack_cache_process_bytes (.+)$", metrics, re.MULTILINE)[0]) == num_bytes


def test_router_of_another_base_is_refused_and_the_old_one_stays(tmp_path: Path, base: Base) -> None:
    with serve_app(compose_app_for(base, settings_for(tmp_path))) as url, httpx.Client(base_url=url) as client:
        client.headers["authorization"] = "Bearer k"
        path = tmp_path / write_router(tmp_path, base, ("chat",))
        checkpoint = RouterCheckpoint.load(path)
        RouterCheckpoint(
            network=checkpoint.network,
            settings=checkpoint.settings,
            policy=checkpoint.policy,
            stack_digests=checkpoint.stack_digests,
            base_fingerprint="other",
        ).save(tmp_path / "foreign.safetensors")
        refused = client.put("/admin/router", json={"path": "foreign.safetensors"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "router_incompatible")
        stack = client.put("/admin/router", json={"path": write_domain(tmp_path, base, "math", seed=0)})
        assert (stack.status_code, stack.json()["error"]["code"]) == (400, "router_invalid")
        assert client.get("/admin/domains").json()["router"] is None


def test_router_that_does_not_fit_the_base_is_refused_with_the_numbers(tmp_path: Path, base: Base) -> None:
    with serve_app(compose_app_for(base, settings_for(tmp_path))) as url, httpx.Client(base_url=url) as client:
        client.headers["authorization"] = "Bearer k"
        for mid_layer, token_dim, numbers in (
            (base.num_layers + 1, base.hidden_size, (base.num_layers + 1, base.num_layers)),
            (base.num_layers, base.hidden_size + 1, (base.hidden_size + 1, base.hidden_size)),
        ):
            name = write_router(tmp_path, base, ("chat",), mid_layer=mid_layer, token_dim=token_dim)
            error = client.put("/admin/router", json={"path": name}).json()["error"]
            assert error["code"] == "router_incompatible"
            for number in numbers:
                assert str(number) in error["message"]
            assert str(tmp_path) not in error["message"]


def test_domains_that_changed_since_the_router_was_trained_are_named(
    tmp_path: Path, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_app(compose_app_for(base, settings_for(tmp_path))) as url, httpx.Client(base_url=url) as client:
        client.headers["authorization"] = "Bearer k"

        def register(domain: str, seed: int) -> str:
            body = {"stacks": [{"path": write_domain(tmp_path, base, domain, seed=seed)}]}
            digest: str = client.put(f"/admin/domains/{domain}", json=body).json()["stacks"][0]["digest"]
            return digest

        def stale() -> list[str]:
            named: list[str] = client.get("/admin/domains").json()["router"]["stale"]
            return named

        digests = {domain: (register(domain, seed),) for seed, domain in enumerate(("chat", "math"))}
        router = write_router(tmp_path, base, ("chat", "math"), digests=digests)
        assert client.put("/admin/router", json={"path": router}).json()["router"]["stale"] == []
        assert stale() == []
        with caplog.at_level(logging.WARNING):
            register("math", 9)
        assert stale() == ["math"]
        assert "domains=['math']" in caplog.text
    caplog.clear()
    compose_app_for(base, settings_for(tmp_path))
    assert "domains=['math']" in caplog.text


def test_budget_below_the_largest_domain_is_refused_with_the_numbers(tmp_path: Path, base: Base) -> None:
    path = tmp_path / "store"
    with closing(StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry)) as registry:
        entry = registry.register_domain("math", [tmp_path / write_domain(tmp_path, base, "math", seed=0)]).entry
        num_bytes = registry.resident_bytes(entry, base.dtype)
    settings = settings_for(tmp_path)
    store = settings.store.model_copy(update={"device_budget_bytes": num_bytes - 1})
    with pytest.raises(ConfigInvalid, match=f"{num_bytes - 1} bytes.*{num_bytes}"):
        compose_app_for(base, settings.model_copy(update={"store": store}))


def test_store_whose_creation_was_cut_off_is_made_anew(tmp_path: Path, base: Base) -> None:
    (tmp_path / "store" / "domains").mkdir(parents=True)
    (tmp_path / "store" / f".{'a' * 16}.tmp").write_text("half a manifest")
    compose_app_for(base, settings_for(tmp_path))
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"domains", "routers", "manifest.json"}


def test_store_of_another_base_is_refused(tmp_path: Path, base: Base) -> None:
    StackRegistry.create(tmp_path / "store", base_fingerprint="other", geometry=tiny_geometry()).close()
    with pytest.raises(StackIncompatible, match="other"):
        compose_app_for(base, settings_for(tmp_path))


def test_folder_that_is_no_store_is_not_made_one(tmp_path: Path, base: Base) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigInvalid, match="not a store"):
        compose_app_for(base, settings_for(tmp_path))


def test_engine_settings_that_make_no_sense_are_named(tmp_path: Path, base: Base) -> None:
    with pytest.raises(ConfigInvalid, match="kv_cache_tokens 8"):
        compose_app_for(base, settings_for(tmp_path, kv_cache_tokens=8))


def test_context_is_no_longer_than_the_base_knows(tmp_path: Path, base: Base) -> None:
    app = compose_app_for(base, settings_for(tmp_path, max_model_len=100_000, kv_cache_tokens=100_000))
    assert app.state.service.engine.max_model_len == base.max_positions


def test_object_settings_that_no_driver_takes_are_named(tmp_path: Path, base: Base) -> None:
    settings = settings_for(tmp_path)
    store = settings.store.model_copy(update={"object_roots": ["nosuch://x/"]})
    with pytest.raises(ConfigInvalid, match=r"store\.object_roots.*'nosuch': fsspec knows no such scheme"):
        compose_app_for(base, settings.model_copy(update={"store": store}))
