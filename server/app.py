"""Makes the HTTP application of parts that exist already. Knows routes and middleware; compose.py makes the parts."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.access import Keys
from server.body_limit import BodyLimit
from server.boundary import RequestBoundary
from server.config import Settings
from server.error_responses import install_handlers
from server.routes import admin, health, openai, playground
from server.service import Service
from server.store_admin import StoreAdmin


def create_app(
    service: Service, store_admin: StoreAdmin, settings: Settings, *, workers: ThreadPoolExecutor | None = None
) -> FastAPI:
    """An app whose lifespan starts and stops the engine. `workers` run what the event loop must not wait for."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if workers is not None:
            asyncio.get_running_loop().set_default_executor(workers)
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)  # waits for the step that runs
            await store_admin.close()
            service.catalog.cache.close()
            await asyncio.to_thread(service.close)

    # The interactive documentation would load its scripts from another host; /openapi.json stays.
    app = FastAPI(title="Brainstacks", lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.store_admin = store_admin
    app.state.settings = settings
    app.state.keys = Keys(api_keys=settings.server.api_keys, admin_key=settings.server.admin_key)
    install_handlers(app)
    for part in (openai, admin, health, playground):
        app.include_router(part.router)
    app.mount("/playground", playground.PlaygroundFiles(), name="playground")
    app.add_middleware(BodyLimit, max_body_bytes=settings.server.max_body_bytes)
    app.add_middleware(RequestBoundary, metrics=service.metrics)
    return app
