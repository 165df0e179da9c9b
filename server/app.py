"""Makes the HTTP application of parts that exist already. Knows routes and middleware; compose.py makes the parts."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.access import Keys
from server.body_limit import BodyLimit
from server.boundary import RequestBoundary
from server.config import Settings
from server.drain import Drain, DrainGate
from server.error_responses import install_handlers
from server.openapi import DocumentedApi
from server.ports import EnginePort
from server.rate_limits import RateLimits
from server.routes import admin, health, openai, playground
from server.service import Service
from server.store_admin import StoreAdmin
from server.tracing import Tracer, open_tracer
from server.version import package_version

logger = logging.getLogger(__name__)

ENGINE_STOP_SECONDS = 10.0  # many steps; an engine that needs longer is stuck in one

CORS_METHODS = ("GET", "POST", "PUT", "DELETE")
EXPOSED_HEADERS = (
    "x-request-id",
    openai.MIX_HEADER,
    "retry-after",
    "x-should-retry",
    "etag",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)


def create_app(
    service: Service,
    store_admin: StoreAdmin,
    settings: Settings,
    *,
    workers: ThreadPoolExecutor | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """An app whose lifespan starts and stops the engine. `workers` run what the event loop must not wait for.

    Without a `tracer`, requests are traced as the settings say.
    """
    if tracer is None:
        tracer = open_tracer(settings.telemetry, version=package_version())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if workers is not None:
            asyncio.get_running_loop().set_default_executor(workers)
        service.engine.start()
        store_admin.start()
        try:
            yield
        finally:
            app.state.is_engine_stuck = not await _stop_engine(service.engine)
            await store_admin.close()
            service.catalog.close()
            await asyncio.to_thread(service.close)
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    # The interactive documentation would load its scripts from another host; /openapi.json stays.
    app = DocumentedApi(
        title="Brainstacks",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.store_admin = store_admin
    app.state.settings = settings
    app.state.drain = Drain()
    app.state.is_engine_stuck = False
    app.state.keys = Keys(api_keys=settings.server.api_keys, admin_key=settings.server.admin_key)
    app.state.rate_limits = RateLimits(
        requests_per_minute=settings.server.requests_per_minute, tokens_per_minute=settings.server.tokens_per_minute
    )
    install_handlers(app)
    for part in (openai, admin, health, playground):
        app.include_router(part.router)
    app.mount("/playground", playground.PlaygroundFiles(), name="playground")
    _add_middleware(app, settings, tracer)
    return app


def _add_middleware(app: FastAPI, settings: Settings, tracer: Tracer | None) -> None:
    """The innermost first."""
    server = settings.server
    app.add_middleware(BodyLimit, max_body_bytes=server.max_body_bytes, timeout_seconds=server.request_timeout_seconds)
    app.add_middleware(DrainGate, drain=app.state.drain)
    app.add_middleware(RequestBoundary, metrics=app.state.service.metrics, tracer=tracer)
    if server.cors_origins:
        # Outermost, so that a page can read every error. Keys travel in a header that a page must set itself, so no
        # origin is allowed to send credentials that a browser keeps.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],  # OpenAI's own client for browsers sends a dozen
            expose_headers=EXPOSED_HEADERS,
        )


async def _stop_engine(engine: EnginePort) -> bool:
    """Whether it ended. Waits for the step that runs, but not for ever."""
    thread = threading.Thread(target=engine.stop, name="engine-stop", daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, ENGINE_STOP_SECONDS)
    if thread.is_alive():
        logger.critical("engine stuck seconds=%.1f: its step does not end", ENGINE_STOP_SECONDS)
    return not thread.is_alive()
