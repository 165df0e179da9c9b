"""Makes OpenTelemetry spans of requests and their phases. Knows spans and exporters; imported only where traces are on.

A span has names, numbers and the mix, never a text: an error is told by its class.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.tracing import ENGINE_PHASES

logger = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
CLOSE_SECONDS = 2.0  # a collector that does not answer must not hold up the end of the process
NANOSECONDS = 1_000_000_000


class OtelTracer:
    """Sends its spans to one processor."""

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        sample_ratio: float = 1.0,
        version: str = "",
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`give_up` ends what the processor is trying to send."""
        self._give_up = give_up
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "brainstacks", "service.version": version}),
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("brainstacks")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Mapping[str, str]) -> "OtelRequestTrace":
        """A server span, under the one that `traceparent` names if it is there."""
        parent = self._propagator.extract(headers, context=Context())
        return OtelRequestTrace(self._tracer, parent)

    def close(self) -> None:
        """Sends what has not been sent yet, for a bounded time. Blocks."""
        # In a thread that may be left behind, because an exporter tries again for longer than anybody would wait.
        thread = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("traces not sent seconds=%.1f reason='the collector does not answer'", CLOSE_SECONDS)
            self._give_up()


class OtelRequestTrace:
    """The span of one request, and those of its phases under it."""

    def __init__(self, tracer: trace.Tracer, parent: Context) -> None:
        self._tracer = tracer
        self._span = tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        self._context = trace.set_span_in_context(self._span, Context())

    @property
    def trace_id(self) -> str:
        """32 hex digits, as `traceparent` has them."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Also of a phase that was cancelled or failed, which its status says."""
        span = self._tracer.start_span(name, context=self._context)
        try:
            yield
        except BaseException as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()

    def engine_done(self, seconds: Mapping[str, float]) -> None:
        """The phases follow each other without a gap, so that lengths and the last one's end say where each lies."""
        end = time.time_ns()
        for name in reversed(ENGINE_PHASES):
            if name in seconds:
                begin = end - int(seconds[name] * NANOSECONDS)
                self._tracer.start_span(name, context=self._context, start_time=begin).end(end)
                end = begin

    def end(self, *, name: str, status: int, facts: Mapping[str, str | int]) -> None:
        """Names and closes the request's span."""
        self._span.update_name(name)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(facts)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def otlp_tracer(endpoint: str, sample_ratio: float, *, version: str) -> OtelTracer:
    """Sends batches to a collector from a thread of its own; what the collector does not take is dropped, not kept."""
    exporter = OTLPSpanExporter(endpoint=_traces_url(endpoint))
    processor = BatchSpanProcessor(exporter)
    return OtelTracer(processor, sample_ratio=sample_ratio, version=version, give_up=exporter.shutdown)


def _traces_url(endpoint: str) -> str:
    """The collector's URL for traces, where only the collector was named."""
    parts = urlsplit(endpoint)
    return endpoint if parts.path.strip("/") else urlunsplit(parts._replace(path=TRACES_PATH))
