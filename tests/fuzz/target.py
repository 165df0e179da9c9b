"""Runs the whole server on a tiny base for fuzzing. Knows its keys, its store and the files that may be imported."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from engine.model.base import load_base
from server.compose import compose_app_for
from server.config import load_settings
from tests.evaluation_stores import make_evaluation_store
from tests.servers import serve_app
from tests.tiny_bases import make_llama

API_KEY, ADMIN_KEY = "user", "boss"
SERVED = "tiny"
REQUEST_SECONDS = 300.0  # for as many tokens as fit, on a busy machine
ROUNDS = {"chat": 1, "math": 2, "reasoning": 1}


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    url: str
    document: dict[str, Any]
    digests: tuple[str, ...]  # of the stacks that are registered

    def client(self) -> httpx.Client:
        """Without a key."""
        return httpx.Client(base_url=self.url, timeout=REQUEST_SECONDS)

    def restore(self) -> None:
        """All domains are registered, whatever became of them."""
        with self.client() as http:
            http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
            for domain, rounds in ROUNDS.items():
                stacks = [{"path": f"{domain}-{number}.safetensors"} for number in range(1, rounds + 1)]
                answer = http.put(f"/admin/domains/{domain}", json={"stacks": stacks})
                assert answer.is_success, answer.text


@contextmanager
def fuzzed_server(folder: Path) -> Iterator[Target]:
    """Three domains, a router, keys on both doors, and the domains' files to import again."""
    base_folder = make_llama(folder / "base", max_position_embeddings=2048)
    base = load_base(str(base_folder), base_format="dense", dtype="float32", device="cpu")
    store = make_evaluation_store(folder / "files", base)
    manifest = json.loads((store / "manifest.json").read_text())
    settings = load_settings(
        flags={
            "server": {
                "api_keys": [API_KEY],
                "admin_key": ADMIN_KEY,
                "served_model_name": SERVED,
                "max_queue": 8,  # so that no request asks for more than this machine answers in time
            },
            "engine": {"max_model_len": 1024, "kv_cache_tokens": 4096, "max_batch_rows": 4},
            "store": {"path": store, "import_root": folder / "files", "device_budget_bytes": 10**7},
        }
    )
    with serve_app(compose_app_for(base, settings)) as url:
        document = httpx.get(f"{url}/openapi.json").json()
        yield Target(url, document, tuple(d["stacks"][0]["digest"] for d in manifest["domains"]))
