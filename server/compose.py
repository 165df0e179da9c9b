"""Makes the real parts from settings and puts them together. Knows which part needs which; holds no behaviour.

Everything heavy is imported here, so the command line imports this module after the thread plan is applied.
"""

import copy
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from engine.engine import Engine
from engine.grammar import GrammarCompiler
from engine.model.base import Base, load_base
from engine.slots import ResidentDomain, prepare_loads
from router.checkpoint import RouterCheckpoint
from router.errors import CheckpointIncompatible
from router.router import Router
from server.admission import Admission
from server.app import create_app
from server.catalog import Catalog, Versions
from server.config import ServerSettings, Settings, StoreSettings, demo_store_path
from server.demo_store import seed_store
from server.domain_loader import DeviceLoader, FileLoader
from server.downloads import Downloads
from server.errors import ConfigInvalid
from server.gap_log import GapLog
from server.live_router import LiveRouter, warn_of_stale_domains
from server.memory import available_memory_bytes
from server.metrics import FILE_SOURCE, HOST_SOURCE, ServerMetrics, TierMetrics
from server.prompts import PromptReader
from server.routing import Routing
from server.service import Service
from server.sources import Sources
from server.store_admin import StoreAdmin
from server.token_text import TokenText
from server.version import package_version
from stack_store.cache import ResidentCache
from stack_store.downloads import Downloader
from stack_store.errors import ObjectStorageInvalid
from stack_store.integrity import IntegrityCheck
from stack_store.object_storage import ObjectStorage
from stack_store.registry import StackRegistry
from stack_store.uploads import BlobStore

logger = logging.getLogger(__name__)

UPLOADS_FOLDER = "uploads"
AUTO_BUDGET_SHARE = 4  # a quarter of what is available
NUM_ROUTER_THREADS = 8  # routes that are made side by side; they mostly wait for the engine
NUM_WORKERS = 4  # for what the event loop must not wait for: files, long texts


def compose_app(settings: Settings) -> FastAPI:
    """Loads the base, opens the store and returns the app. Raises what is wrong with either, by name."""
    if not sys.stderr.isatty():  # a bar that nobody watches fills the log
        disable_progress_bar()  # type: ignore[no-untyped-call]
    engine_settings = settings.engine
    base = load_base(
        engine_settings.base,
        base_format=engine_settings.base_format,
        dtype=engine_settings.dtype,
        device=engine_settings.device,
    )
    return compose_app_for(base, settings)


def compose_app_for(base: Base, settings: Settings) -> FastAPI:
    """As `compose_app`, with a base that is loaded already."""
    storage = _object_storage(settings.store)
    demo = demo_store_path()
    if settings.store.is_default_path and demo is not None:
        seed_store(settings.store.path, demo)
    registry = _open_store(settings.store.path, base)
    engine = _make_engine(base, settings)
    metrics = ServerMetrics(version=package_version(), base=base.model_id)
    versions = Versions()
    budget_bytes = settings.store.device_budget_bytes or available_memory_bytes(base.device) // AUTO_BUDGET_SHARE
    prepare_loads(base.dtype)
    files = FileLoader(registry, versions, metrics, dtype=base.dtype, device=base.device, panelled=engine.wants_panels)
    host = _make_host_tier(files, settings.store)
    cache = ResidentCache[ResidentDomain](
        budget_bytes=budget_bytes,
        load=DeviceLoader(files, host),
        observer=TierMetrics(
            metrics,
            "device",
            FILE_SOURCE if host is None else HOST_SOURCE,
            in_process=base.device.type != "cuda",
        ),
        executor=_pool_without_teams("stack-loader", settings.store.loader_threads),
    )
    metrics.cache_budget.labels("device").set(budget_bytes)
    catalog = Catalog(
        registry,
        cache,
        versions,
        dtype=base.dtype,
        lease_timeout_seconds=settings.store.lease_timeout_seconds,
        host=host,
    )
    catalog.read_headers()
    _require_room(budget_bytes, catalog)
    routing = _make_routing(engine, base, registry)
    warn_of_stale_domains(routing.router, registry.manifest.domains)
    service = Service(
        engine=engine,
        catalog=catalog,
        routing=routing,
        # A copy, because the engine's thread uses the original.
        reader=PromptReader(
            copy.deepcopy(base.tokenizer),
            max_model_len=engine.max_model_len,
            vocabulary_size=base.text_config.vocab_size,
        ),
        grammars=GrammarCompiler(
            base.tokenizer, vocabulary=base.text_config.vocab_size, eos_token_ids=base.eos_token_ids
        ),
        token_text=TokenText(base.tokenizer),
        metrics=metrics,
        admission=Admission(limit=settings.engine.max_batch_rows + settings.server.max_queue),
        served_name=settings.server.served_model_name or base.model_id,
        gap_log=_make_gap_log(settings.server),
    )
    uploads = BlobStore(settings.store.path / UPLOADS_FOLDER, max_bytes=settings.server.max_upload_bytes)
    sources = Sources(registry, uploads, import_root=settings.store.import_root)
    downloads = Downloads(storage, Downloader(storage, uploads, metrics), sources)
    integrity = IntegrityCheck(
        registry,
        metrics,
        bytes_per_second=settings.store.verify_bytes_per_second,
        interval_seconds=settings.store.verify_interval_seconds,
    )
    metrics.integrity_damaged.set_function(lambda: integrity.num_damaged)
    store_admin = StoreAdmin(catalog, routing, sources, downloads, integrity, budget_bytes=budget_bytes)
    logger.info(
        "server composed model=%s store=%s domains=%s router=%s device_budget_bytes=%d threads=%d",
        service.served_name,
        settings.store.path,
        catalog.names(),
        routing.is_available,
        budget_bytes,
        torch.get_num_threads(),
    )
    return create_app(service, store_admin, settings, workers=_pool_without_teams("worker", NUM_WORKERS))


def _make_host_tier(files: FileLoader, settings: StoreSettings) -> ResidentCache[ResidentDomain] | None:
    """Where the device is CUDA, unless its budget is 0."""
    budget_bytes = settings.host_budget_bytes
    if files.device.type != "cuda":
        if budget_bytes:
            raise ConfigInvalid(
                f"store.host_budget_bytes: is {budget_bytes}, but {files.device} has no memory of its own"
            )
        return None
    if budget_bytes is None:
        budget_bytes = available_memory_bytes(torch.device("cpu")) // AUTO_BUDGET_SHARE
    if budget_bytes == 0:
        return None
    files.metrics.cache_budget.labels("host").set(budget_bytes)
    return ResidentCache[ResidentDomain](
        budget_bytes=budget_bytes,
        load=files,
        observer=TierMetrics(files.metrics, "host", FILE_SOURCE, in_process=True),
        executor=_pool_without_teams("stack-reader", settings.loader_threads),
    )


def _object_storage(settings: StoreSettings) -> ObjectStorage:
    try:
        return ObjectStorage(settings.object_roots, settings.object_options)
    except ObjectStorageInvalid as error:
        raise ConfigInvalid(f"store.object_roots, store.object_options: {error}") from error


def _make_gap_log(settings: ServerSettings) -> GapLog | None:
    return None if settings.gap_log is None else GapLog(settings.gap_log, max_bytes=settings.gap_log_bytes)


def _pool_without_teams(name: str, count: int) -> ThreadPoolExecutor:
    """Threads whose own tensor work has no team: a team each would fight the engine's for the cores."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=partial(torch.set_num_threads, 1))


def _open_store(path: Path, base: Base) -> StackRegistry:
    if (path / "manifest.json").is_file():
        return StackRegistry.open(path, base_fingerprint=base.fingerprint, geometry=base.geometry)
    if not StackRegistry.is_unborn(path):
        raise ConfigInvalid(f"store.path: {str(path)!r} holds files but no manifest.json, so it is not a store")
    logger.info("store created path=%s", path)
    try:
        return StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry)
    except OSError as error:
        raise ConfigInvalid(f"store.path: no store can be made in {str(path)!r}: {error.strerror}") from error


def _require_room(budget_bytes: int, catalog: Catalog) -> None:
    largest_bytes = catalog.largest_bytes()
    if budget_bytes < largest_bytes:
        raise ConfigInvalid(
            f"store.device_budget_bytes: the budget is {budget_bytes} bytes, the largest domain of the store needs "
            f"{largest_bytes}"
        )


def _require_shape(checkpoint: RouterCheckpoint, base: Base, path: Path) -> None:
    """A base of the right fingerprint has the right shape too, unless the file lies."""
    token_dim, mid_layer = checkpoint.network.token_dim, checkpoint.settings.mid_layer
    if token_dim != base.hidden_size:
        raise CheckpointIncompatible(
            f"router file {path} reads features of {token_dim} numbers, the base's hidden states have "
            f"{base.hidden_size}"
        )
    if mid_layer > base.num_layers:
        raise CheckpointIncompatible(f"router file {path} reads layer {mid_layer}, the base has {base.num_layers}")


def _make_engine(base: Base, settings: Settings) -> Engine:
    wanted = settings.engine
    max_model_len = min(wanted.max_model_len, base.max_positions)
    if max_model_len < wanted.max_model_len:
        logger.warning("max_model_len lowered from=%d to=%d reason=base", wanted.max_model_len, max_model_len)
    try:
        return Engine(
            base,
            max_batch_rows=wanted.max_batch_rows,
            max_model_len=max_model_len,
            kv_cache_tokens=wanted.kv_cache_tokens,
            prompt_tokens_beside_decode=wanted.prompt_tokens_beside_decode,
            fused_step=wanted.fused_step,
        )
    except ValueError as error:
        raise ConfigInvalid(f"engine: {error}") from error


def _make_routing(engine: Engine, base: Base, registry: StackRegistry) -> Routing:
    def load_router(path: Path) -> LiveRouter:
        checkpoint = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
        _require_shape(checkpoint, base, path)

        def read(token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            return engine.read(token_ids, checkpoint.settings.mid_layer).result()

        tokenizer = copy.deepcopy(base.tokenizer)
        router = Router.from_checkpoint(checkpoint, tokenizer=tokenizer, hidden_states=read)
        return LiveRouter(router, checkpoint.stack_digests)

    path = registry.router_path()
    if path is None:
        logger.warning("store has no router path=%s: requests are answered by the base alone", registry.path)
    threads = _pool_without_teams("router", NUM_ROUTER_THREADS)
    return Routing(threads.submit, load_router=load_router, router=None if path is None else load_router(path))
