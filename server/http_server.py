"""Serves an app over HTTP until the process is told to end. Knows signals and the order of the end; no request.

After SIGTERM or SIGINT readiness turns false; after `shutdown_delay_seconds` new requests are refused, while running
ones have `drain_seconds`; then these are told; then the process ends with status 0. A second signal ends it at once. An
engine whose loop has ended by an error ends the process with status 1; one that is stuck leaves it not ready, and makes
status 1 of a signal's end.
"""

import asyncio
import logging
import math
import os
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.errors import EngineFailed
from server.config import ServerSettings
from server.disconnect import LAST_SENDS_SECONDS
from server.drain import Drain
from server.http_protocol import BoundedHttpProtocol
from server.ports import EnginePort

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
SIGNALLED = 128  # what shells add to a signal's number
FAILED_DRAIN_SECONDS = 5.0  # what a failed engine was asked has failed already; answers are still on their way


def run_app(app: FastAPI, settings: ServerSettings) -> None:
    """Blocks until the server has been told to stop and its requests have ended. Raises EngineFailed."""
    server = DrainingServer(app, settings)
    server.run()
    if app.state.is_engine_stuck:
        logging.shutdown()
        os._exit(1)  # threads that wait for the engine would be waited for
    if server.engine_failed:
        raise EngineFailed("the engine's loop ended by an error; the log has its traceback")


class DrainingServer(uvicorn.Server):
    """uvicorn's server, but one that goes on listening while it drains."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                http=BoundedHttpProtocol,
                ws="none",
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=settings.trusted_proxies,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=math.ceil(LAST_SENDS_SECONDS) + 1,  # in which clients are told
            )
        )
        self.engine_failed = False
        self._settings = settings
        self._drain: Drain = app.state.drain
        self._engine: EnginePort = app.state.service.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, the second does not wait. May interrupt anything, so logs nothing."""
        if self.should_exit:
            os._exit(SIGNALLED + sig)  # the first process of a container is not ended by signals' default actions
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave: somebody asked for it, or the engine's loop has ended, which nobody did."""
        if not self.engine_failed and math.isinf(self._engine.heartbeat_age_seconds()):
            self.engine_failed = True
            logger.critical("engine ended by an error: the server ends too")
        return await super().on_tick(counter) or self.engine_failed

    async def main_loop(self) -> None:
        """Serves, and then drains, before anything is closed."""
        await super().main_loop()
        self._drain.is_leaving = True
        reason = "engine" if self.engine_failed else "signal"
        logger.info("server leaves requests=%d reason=%s", self._drain.num_running, reason)
        await self._wait(self._settings.shutdown_delay_seconds, until=lambda: self.engine_failed)
        self._drain.is_closed = True
        drain_seconds = self._settings.drain_seconds
        seconds = min(drain_seconds, FAILED_DRAIN_SECONDS) if self.engine_failed else drain_seconds
        await self._wait(seconds, until=self._is_empty)
        if self._is_empty():
            logger.info("server drained")
        else:
            logger.warning("requests ended unfinished requests=%d reason='no time left'", self._drain.num_running)
            self._drain.end_all()

    def _is_empty(self) -> bool:
        return self._drain.num_running == 0

    async def _wait(self, seconds: float, *, until: Callable[[], bool]) -> None:
        """So long, or less if it comes true."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (left_seconds := deadline - loop.time()) > 0 and not until():
            await asyncio.sleep(min(TICK_SECONDS, left_seconds))
            await self.on_tick(0)  # answers are dated
