"""Configures logging once: a line an event, with the request's id, as text or JSON. Knows nothing of what is logged.

Never a prompt or an answer above DEBUG. Events are written `event key=value key=value`; JSON has the values apart too.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from server.tracing import trace_var

request_id_var: ContextVar[str] = ContextVar("request_id", default="-")

SIGNING = ("botocore", "aiobotocore", "s3fs", "fsspec")  # at DEBUG they tell what requests are signed with

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"

# Of a message's template: a placeholder that takes one argument, with the key before it if there is one.
PLACEHOLDER = re.compile(r"(?:(?P<key>[a-z_][a-z0-9_]*)=['\"]?)?%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]")
PLAIN_TYPES = (str, int, float, bool, type(None))


class RequestIdFilter(logging.Filter):
    """Stamps every record with the id of the request it belongs to, and of its trace."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_var.get()
        trace = trace_var.get()
        record.trace_id = None if trace is None else trace.trace_id
        return True


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, request_id, message; fields, trace_id and exception if there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        if fields := fields_of(record):
            line["fields"] = fields
        if (trace_id := getattr(record, "trace_id", None)) is not None:
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The values that the message names, `key=%s`, as they were given; what JSON does not have is shown as text."""
    if not isinstance(record.args, tuple):
        return {}
    placeholders = list(PLACEHOLDER.finditer(str(record.msg).replace("%%", "")))
    if len(placeholders) != len(record.args):
        return {}
    named = zip(placeholders, record.args, strict=True)
    return {match["key"]: _plain(value) for match, value in named if match["key"] is not None}


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, PLAIN_TYPES):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def configure_logging(level: str, form: Literal["text", "json"] = "text") -> None:
    """Sends every logger to stderr at `level`; chatty libraries stay at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT) if form == "text" else JsonFormatter())
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "transformers", "urllib3", "asyncio", "opentelemetry", *SIGNING):
        logging.getLogger(chatty).setLevel(logging.WARNING)
