"""Starts the server's process: threads, logging, parts, HTTP. Knows their order; torch is imported in the middle."""

import logging
import os
import sys
from importlib import import_module

from server.config import Settings
from server.logs import configure_logging
from server.threads import apply_thread_plan, thread_plan

logger = logging.getLogger(__name__)


def run_server(settings: Settings) -> None:
    """Blocks until the server has been told to stop and its requests have ended. Raises EngineFailed."""
    configure_logging(settings.log.level, settings.log.format)
    plan = thread_plan(len(os.sched_getaffinity(0)), settings.engine.threads)
    held = apply_thread_plan(plan, os.environ, is_override=settings.engine.threads is not None)
    logger.info("threads %s reason=%r", " ".join(f"{name}={value}" for name, value in held.items()), plan.reason)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: a bar that nobody watches fills the log
    # Imported now and not above: torch reads the variables just set when it is imported.
    app = import_module("server.compose").compose_app(settings)
    import_module("server.http_server").run_app(app, settings.server)
