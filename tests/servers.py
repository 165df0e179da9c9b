"""Runs the real app over a real store, with an engine and a router that do what a test tells them to.

The engine has the real engine's interface and its own thread, and answers with a fixed text, one byte a token. Gates
hold it wherever a test wants a request to stand still.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from engine.errors import EngineStopped
from engine.grammar import GrammarCompiler
from engine.slots import ResidentDomain
from engine.types import (
    EngineSnapshot,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    TokenLogprob,
    TokensEvent,
)
from router.policy import RoutingPolicy
from router.router import Route
from server.admission import Admission
from server.app import create_app
from server.catalog import Catalog, Versions
from server.config import ServerSettings, load_settings
from server.domain_loader import DeviceLoader, FileLoader
from server.downloads import Downloads
from server.gap_log import GapLog
from server.http_server import DrainingServer
from server.metrics import FILE_SOURCE, ServerMetrics, TierMetrics
from server.prompts import PromptReader
from server.routing import Routing
from server.service import Service
from server.sources import Sources
from server.store_admin import StoreAdmin
from server.token_text import TokenText
from server.tracing import Tracer
from stack_store.cache import ResidentCache
from stack_store.downloads import CHUNK_BYTES, Downloader
from stack_store.format import ProjectionTensors, pack_groups, write_stack
from stack_store.integrity import IntegrityCheck
from stack_store.object_storage import ObjectStorage
from stack_store.registry import StackRegistry
from stack_store.uploads import BlobStore
from tests.fakes import tiny_geometry, tiny_header, write_random_stack

T = TypeVar("T")

BASE = "tiny-base"
WAIT_SECONDS = 10.0
ANSWER = "caf\u00e9 au lait"

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token a byte, in the alphabet that GPT-2 uses, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]
    fast.chat_template = TEMPLATE
    return fast


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    on_event: Callable[[Event], None]
    token_ids: list[int]
    num_sent: int = 0
    prompt_done: bool = False


class ScriptedEngine:
    """Answers every request with `answer`; `may_run` and `may_decode` hold it before prefill and between tokens."""

    def __init__(self, tokenizer: Any, *, answer: str = ANSWER, max_model_len: int = 400) -> None:
        self.max_model_len = max_model_len
        self.may_run = threading.Event()
        self.may_decode = threading.Event()
        self.may_route = threading.Event()
        for gate in (self.may_run, self.may_decode, self.may_route):
            gate.set()
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.fail_with: Exception | None = None
        self.refuse_with: Exception | None = None
        self.heartbeat_age = 0.0
        self._tokenizer = tokenizer
        self._answer = answer
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        for gate in (self.may_run, self.may_decode, self.may_route):
            gate.set()
        self._thread.join()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        if self.refuse_with is not None:
            raise self.refuse_with
        if self._stopping:
            raise EngineStopped("the engine is shutting down")
        self.submitted.append(request)
        token_ids = self._tokenizer.encode(self._answer, add_special_tokens=False)
        running = _Running(request, on_event, token_ids[: request.sampling.max_tokens])
        self._commands.put(lambda: self._running.update({request.request_id: running}))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._commands.put(lambda: self._finish(request_id, "cancelled"))

    def run_on_device(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            self.may_route.wait(WAIT_SECONDS)
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  it belongs to whoever gave the work
                future.set_exception(error)

        self._commands.put(run)
        return future

    def num_sent(self) -> int:
        """Tokens that the running sequences have sent so far."""
        return sum(running.num_sent for running in list(self._running.values()))

    def heartbeat_age_seconds(self) -> float:
        return self.heartbeat_age

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(len(self._running), 0, 0.25, 0, 3)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._commands.get(timeout=0.001)()
            except queue.Empty:
                self._step()
        for running in list(self._running.values()):
            running.on_event(FailedEvent(EngineStopped("the engine is shutting down")))

    def _step(self) -> None:
        if not self.may_run.is_set():
            return
        for running in list(self._running.values()):
            if self.fail_with is not None and running.num_sent:
                del self._running[running.request.request_id]
                running.on_event(FailedEvent(self.fail_with))
            elif not running.prompt_done:
                running.prompt_done = True
                running.on_event(PromptEvent(self._prompt_logprobs(running.request)))
            elif running.num_sent == len(running.token_ids):
                wanted = running.request.sampling.max_tokens
                self._finish(running.request.request_id, "length" if running.num_sent == wanted else "stop")
            elif self.may_decode.is_set() or running.num_sent == 0:
                running.on_event(self._next_token(running))

    def _next_token(self, running: _Running) -> TokensEvent:
        token_id = running.token_ids[running.num_sent]
        running.num_sent += 1
        text = self._tokenizer.decode(running.token_ids[: running.num_sent])
        before = self._tokenizer.decode(running.token_ids[: running.num_sent - 1])
        piece = "" if text.endswith("\ufffd") else text[len(before.rstrip("\ufffd")) :]
        num_top = running.request.sampling.logprobs
        return TokensEvent(piece, (token_id,), () if num_top is None else (_logprob(token_id, num_top),))

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[TokenLogprob | None, ...] | None:
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return None
        return (None, *(_logprob(token_id, num_top) for token_id in request.prompt_ids[1:]))

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            seconds = {"queue": 0.01, "prefill": 0.02, "decode": 0.03}
            running.on_event(FinishedEvent(reason, len(running.request.prompt_ids), running.num_sent, seconds))


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token itself is likeliest, then the ids from 0 on."""
    top = tuple((i, -1.0 - i) for i in range(num_top - 1))
    return TokenLogprob(token_id, -0.5, ((token_id, -0.5), *top)[:num_top])


class ScriptedRouter:
    """Scores a text by the words in it: `math=0.9` scores the domain math with 0.9."""

    max_tokens = 8

    def __init__(self, domains: tuple[str, ...] = ("chat", "code", "math")) -> None:
        self.domains = domains
        self.stack_digests: dict[str, tuple[str, ...]] = {}
        self.policy = RoutingPolicy()
        self.texts: list[str] = []

    def route(self, text: str) -> Route:
        self.texts.append(text)
        said = dict(word.split("=") for word in text.split() if "=" in word)
        scores = {domain: float(said.get(domain, 0.01)) for domain in self.domains}
        return Route(scores=scores, mix=self.policy.mix_from_scores(scores), gap=self.policy.is_gap(scores))


@dataclass
class LiveServer:
    """A running server and the parts that tests look into."""

    url: str
    engine: ScriptedEngine
    router: ScriptedRouter
    service: Service
    registry: StackRegistry
    cache: ResidentCache[ResidentDomain]
    import_root: Path
    may_load: threading.Event
    http: DrainingServer
    routers: dict[str, ScriptedRouter] = field(default_factory=dict)  # by the last 8 bytes of a router file, in hex

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_SECONDS)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"no sample of {name} {labels}"
        return value

    def resident_bytes(self, domain: str) -> int:
        return self.registry.resident_bytes(self.registry.domain(domain), torch.float32)


def wait_until(is_true: Callable[[], bool], *, what: str) -> None:
    """Looks again and again, and fails after a while."""
    ends = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < ends, f"never came true: {what}"
        time.sleep(0.002)


def make_store(path: Path, sources: Path, domains: tuple[str, ...] = ("chat", "code", "math")) -> StackRegistry:
    """A store of small domains that are all of one size, and their files in `sources`."""
    registry = StackRegistry.create(path, base_fingerprint=BASE, geometry=tiny_geometry())
    sources.mkdir(parents=True, exist_ok=True)
    for seed, domain in enumerate(domains):
        file = sources / f"{domain}.safetensors"
        write_random_stack(file, tiny_header(domain=domain), seed=seed)
        registry.register_domain(domain, [file])
    return registry


def register_large(registry: StackRegistry, sources: Path, rank: int) -> None:
    """A domain "large" with one stack of that rank, as an int8 file that is smaller than what becomes of it."""
    header = replace(tiny_header(domain="large", weights="int8"), rank=rank)
    experts, geometry = header.num_experts, header.geometry
    zeros = {
        (layer, name): ProjectionTensors(
            a=torch.zeros(experts, rank, num_in),
            b=torch.zeros(experts, num_out, rank),
            gate=torch.zeros(experts, num_in),
        )
        for layer in range(geometry.num_layers)
        for name, (num_in, num_out) in geometry.shapes.items()
    }
    write_stack(sources / "large.safetensors", header, pack_groups(header, zeros))
    registry.register_domain("large", [sources / "large.safetensors"])


def make_downloads(
    sources: Sources,
    metrics: ServerMetrics,
    storage: ObjectStorage | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    num_retries: int = 2,
) -> Downloads:
    """Of no roots unless a storage is given, and quick to try again."""
    storage = storage or ObjectStorage([], {})
    backoff = (0.01,) * num_retries
    downloader = Downloader(storage, sources.uploads, metrics, chunk_bytes=chunk_bytes, backoff_seconds=backoff)
    return Downloads(storage, downloader, sources)


@contextmanager
def run_live_server(
    folder: Path,
    *,
    budget_domains: float = 3,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    has_router: bool = True,
    has_import_root: bool = True,
    answer: str = ANSWER,
    max_model_len: int = 400,
    download_chunk_bytes: int = CHUNK_BYTES,
    failure_ttl_seconds: float = 5.0,
    large_rank: int | None = None,
    num_download_retries: int = 2,
    tracer: Tracer | None = None,
) -> Iterator[LiveServer]:
    """The app on a port of its own, with room for so many of its equal domains.

    `large_rank` adds a domain "large" whose one stack has that rank.
    """
    given = settings or {}
    flags = {**given, "store": {**given.get("store", {}), "path": folder / "store"}}
    chosen = load_settings(flags={**flags, "server": {"drain_seconds": 2, **given.get("server", {})}})
    storage = ObjectStorage(chosen.store.object_roots, chosen.store.object_options)
    if not StackRegistry.is_unborn(folder / "store"):
        registry = StackRegistry.open(folder / "store", base_fingerprint=BASE, geometry=tiny_geometry())
    else:
        registry = make_store(folder / "store", folder / "import")
    if large_rank is not None:
        register_large(registry, folder / "import", large_rank)
    tokenizer = byte_tokenizer()
    engine, router = ScriptedEngine(tokenizer, answer=answer, max_model_len=max_model_len), ScriptedRouter()
    metrics, versions, may_load = ServerMetrics(version="0", base=BASE), Versions(), threading.Event()
    may_load.set()

    files = FileLoader(registry, versions, metrics, dtype=torch.float32, device=torch.device("cpu"), panelled=False)
    loader = DeviceLoader(files, None)

    def load(key: str) -> ResidentDomain:
        may_load.wait(WAIT_SECONDS)
        return loader(key)

    one_domain = registry.resident_bytes(registry.manifest.domains[0], torch.float32)
    budget_bytes = int(one_domain * budget_domains)
    cache = ResidentCache[ResidentDomain](
        budget_bytes=budget_bytes,
        load=load,
        observer=TierMetrics(metrics, "device", FILE_SOURCE, in_process=True),
        failure_ttl_seconds=failure_ttl_seconds,
    )
    catalog = Catalog(
        registry, cache, versions, dtype=torch.float32, lease_timeout_seconds=chosen.store.lease_timeout_seconds
    )
    routers: dict[str, ScriptedRouter] = {}
    routing = Routing(
        engine.run_on_device,
        load_router=lambda path: routers[path.read_bytes()[-8:].hex()],
        router=router if has_router else None,
    )
    service = Service(
        engine=engine,
        catalog=catalog,
        routing=routing,
        reader=PromptReader(tokenizer, max_model_len=engine.max_model_len),
        grammars=GrammarCompiler(
            tokenizer, vocabulary=len(tokenizer), eos_token_ids=frozenset({tokenizer.eos_token_id})
        ),
        token_text=TokenText(tokenizer),
        metrics=metrics,
        admission=Admission(limit=4 + chosen.server.max_queue),
        served_name="tiny",
        gap_log=GapLog(log, max_bytes=chosen.server.gap_log_bytes) if (log := chosen.server.gap_log) else None,
    )
    blobs = BlobStore(folder / "store" / "uploads", max_bytes=chosen.server.max_upload_bytes)
    sources = Sources(registry, blobs, import_root=folder / "import" if has_import_root else None)
    downloads = make_downloads(
        sources, metrics, storage, chunk_bytes=download_chunk_bytes, num_retries=num_download_retries
    )
    integrity = IntegrityCheck(
        registry,
        metrics,
        bytes_per_second=chosen.store.verify_bytes_per_second,
        interval_seconds=chosen.store.verify_interval_seconds,
    )
    metrics.integrity_damaged.set_function(lambda: integrity.num_damaged)
    store_admin = StoreAdmin(catalog, routing, sources, downloads, integrity, budget_bytes=budget_bytes)
    app = create_app(service, store_admin, chosen, tracer=tracer)
    with run_app_in_thread(app, chosen.server) as (http, url):
        yield LiveServer(url, engine, router, service, registry, cache, folder / "import", may_load, http, routers)
        may_load.set()
    blobs.close()
    registry.close()


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """Its address, while a real HTTP server runs it in a thread."""
    with run_app_in_thread(app, ServerSettings(drain_seconds=2)) as (_, url):
        yield url


@contextmanager
def run_app_in_thread(app: FastAPI, settings: ServerSettings) -> Iterator[tuple[DrainingServer, str]]:
    """The real HTTP server, and its address."""
    server = DrainingServer(app, settings.model_copy(update={"port": 0}))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started, what="the server has started")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
