"""The outermost layer of every request: its id, its one log line, its count, and the last catch. Knows no endpoint."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_responses import response_to
from server.errors import answer_for
from server.generation import Generation
from server.logs import request_id_var
from server.metrics import ServerMetrics
from server.tracing import RequestTrace, Tracer, trace_var

logger = logging.getLogger(__name__)

CLIENT_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
PROBES = frozenset({"/metrics", "/health", "/health/live", "/health/ready"})
QUIET_ENDPOINTS = PROBES | {"/admin/cache"}  # asked again and again: logged at DEBUG, unless they are refused
UNKNOWN_ENDPOINT = "other"
TRACE_NAMES = {
    "mix": "brainstacks.mix",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}


@dataclass(slots=True)
class RequestRecord:
    """What the log line and the counter say of a request. Routes add what they learn."""

    request_id: str
    status: int = 500
    generation: Generation | None = None
    headers: dict[str, str] = field(default_factory=dict)  # of the answer, whatever it is
    charge: Callable[[int], None] | None = None  # told at the end how many tokens were used
    began: float = field(default_factory=time.monotonic)
    is_noted: bool = False


def record_of(request: Request) -> RequestRecord:
    """The record that the boundary made for this request."""
    record = request.scope["brainstacks.record"]
    assert isinstance(record, RequestRecord)
    return record


class RequestBoundary:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics, tracer: Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        scope["brainstacks.record"] = record
        token = request_id_var.set(record.request_id)
        trace = trace_var.set(self._begin_trace(scope))
        try:
            await self._answer(scope, receive, send, record)
        finally:
            self._note(scope, record)
            trace_var.reset(trace)
            request_id_var.reset(token)

    def _begin_trace(self, scope: Scope) -> RequestTrace | None:
        if self._tracer is None or scope["path"] in QUIET_ENDPOINTS:
            return None
        return self._tracer.begin(Headers(scope=scope))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": record.request_id, **record.headers})
            elif not message.get("more_body", False):
                self._note(scope, record)  # first, so that whoever has the answer finds it counted
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:  # the HTTP boundary: nothing that a request did may end the server
            logger.exception("request failed")
            record.status = answer_for(error).status
            if not started:
                await response_to(error)(scope, receive, send_noted)

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        """Counts, charges, logs and traces a request once."""
        if record.is_noted:
            return
        record.is_noted = True
        endpoint = getattr(scope.get("route"), "path", UNKNOWN_ENDPOINT)
        self._metrics.requests.labels(endpoint, record.status).inc()
        facts = _generation_facts(record.generation)
        if record.charge is not None and record.generation is not None:
            record.charge(record.generation.tokens_used)
        is_quiet = endpoint in QUIET_ENDPOINTS and record.status < 400
        level = logging.DEBUG if is_quiet else logging.INFO
        seconds = time.monotonic() - record.began
        logger.log(
            level,
            "request done method=%s endpoint=%s status=%d seconds=%.3f" + "".join(f" {name}=%s" for name in facts),
            scope["method"],
            endpoint,
            record.status,
            seconds,
            *facts.values(),
        )
        if (trace := trace_var.get()) is not None:
            _end_trace(trace, scope["method"], endpoint, record, facts)


def _end_trace(
    trace: RequestTrace, method: str, endpoint: str, record: RequestRecord, facts: Mapping[str, str | int]
) -> None:
    """Attributes as OpenTelemetry's conventions name them, and ours."""
    shown: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": endpoint,
        "brainstacks.request_id": record.request_id,
    }
    shown |= {TRACE_NAMES[name]: value for name, value in facts.items()}
    trace.end(name=f"{method} {endpoint}", status=record.status, facts=shown)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if CLIENT_ID.match(given) else f"req-{uuid.uuid4().hex}"


def _generation_facts(generation: Generation | None) -> dict[str, str | int]:
    if generation is None:
        return {}
    read, written = generation.prompt_tokens, generation.completion_tokens
    return {"mix": generation.shown_mix, "prompt_tokens": read, "completion_tokens": written}
