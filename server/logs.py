"""Configures logging once: one sentence a line with the request's id. Knows nothing about what is logged.

Never a prompt or an answer above DEBUG.
"""

import logging
import sys
from contextvars import ContextVar

request_id_var: ContextVar[str] = ContextVar("request_id", default="-")

SIGNING = ("botocore", "aiobotocore", "s3fs", "fsspec")  # at DEBUG they tell what requests are signed with

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


class RequestIdFilter(logging.Filter):
    """Stamps every record with the id of the request it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_var.get()
        return True


def configure_logging(level: str) -> None:
    """Sends every logger to stderr at `level`; chatty libraries stay at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "transformers", "urllib3", "asyncio", *SIGNING):
        logging.getLogger(chatty).setLevel(logging.WARNING)
