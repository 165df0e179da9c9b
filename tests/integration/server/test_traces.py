"""Spans of requests and their phases, as an exporter gets them."""

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import server.telemetry
from engine.errors import EngineFailed
from server.config import TelemetrySettings
from server.errors import ConfigInvalid
from server.telemetry import CLOSE_SECONDS, OtelTracer, _traces_url
from server.tracing import open_tracer
from tests.integration.server.test_lifecycle import asked, assert_nothing_is_left, num_499
from tests.servers import ANSWER, LiveServer, run_live_server, wait_until

PHASES = ("read", "route", "page_in", "queue", "prefill", "decode")
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a private question"
SERVER = Path(server.telemetry.__file__).parent
IMPORT = re.compile(r"^\s*(from|import) (opentelemetry|server\.telemetry)", re.MULTILINE)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(tmp_path: Path, exporter: InMemorySpanExporter) -> Iterator[LiveServer]:
    with run_live_server(tmp_path, tracer=OtelTracer(SimpleSpanProcessor(exporter))) as server:
        yield server


def ask(server: LiveServer, headers: Mapping[str, str] | None = None, *, stream: bool = False) -> None:
    body = {"messages": [{"role": "user", "content": f"{SECRET} math=0.9"}], "stream": stream}
    with server.client() as client:
        client.post("/v1/chat/completions", json=body, headers=headers)


def request_spans(exporter: InMemorySpanExporter, count: int = 1) -> list[ReadableSpan]:
    """Those of whole requests, once there are so many."""

    def found() -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.kind == SpanKind.SERVER]

    wait_until(lambda: len(found()) >= count, what="the requests have ended")
    return found()


def phases_of(exporter: InMemorySpanExporter, request: ReadableSpan) -> Sequence[ReadableSpan]:
    """The spans under a request's, in the order in which they began."""
    assert request.context is not None
    span_id = request.context.span_id
    spans = [s for s in exporter.get_finished_spans() if s.parent is not None and s.parent.span_id == span_id]
    return sorted(spans, key=lambda span: span.start_time or 0)


@pytest.mark.parametrize("stream", [False, True])
def test_request_has_a_span_for_each_phase(traced: LiveServer, exporter: InMemorySpanExporter, stream: bool) -> None:
    ask(traced, {"x-request-id": "req-1"}, stream=stream)
    (request,) = request_spans(exporter)
    assert request.name == "POST /v1/chat/completions"
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "brainstacks.request_id": "req-1",
        "brainstacks.mix": "chat=0.20,math=0.90",
        "gen_ai.usage.input_tokens": len(f"<|user|>{SECRET} math=0.9\n<|assistant|>"),
        "gen_ai.usage.output_tokens": len(ANSWER.encode()),
    }
    phases = phases_of(exporter, request)
    assert sorted(span.name for span in phases) == sorted(PHASES)
    lengths = {span.name: ((span.end_time or 0) - (span.start_time or 0)) / 1e9 for span in phases}
    engine_phases = [span for span in phases if span.name in ("queue", "prefill", "decode")]
    assert [span.name for span in engine_phases] == ["queue", "prefill", "decode"]
    assert [round(lengths[span.name], 6) for span in engine_phases] == [0.01, 0.02, 0.03]  # what the engine said
    assert engine_phases[0].end_time == engine_phases[1].start_time
    assert {span.context.trace_id for span in phases if span.context} == {request.context and request.context.trace_id}


def test_trace_of_the_caller_goes_on(traced: LiveServer, exporter: InMemorySpanExporter) -> None:
    ask(traced, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    ask(traced, {"traceparent": "nonsense"})
    first, second = request_spans(exporter, 2)
    assert first.context is not None
    assert first.parent is not None
    assert second.context is not None
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert (second.parent, second.context.trace_id != first.context.trace_id) == (None, True)


def test_caller_who_does_not_sample_is_honoured(traced: LiveServer, exporter: InMemorySpanExporter) -> None:
    ask(traced, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"})
    ask(traced)
    request_spans(exporter)
    assert TRACE_ID not in {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans() if span.context}


def test_phase_in_which_the_client_went_is_the_last(traced: LiveServer, exporter: InMemorySpanExporter) -> None:
    traced.may_load.clear()
    with asked(traced):
        wait_until(lambda: len(traced.cache.snapshot().entries) == 2, what="the domains load")
    wait_until(lambda: num_499(traced) == 1, what="the request has ended")
    traced.may_load.set()
    (request,) = request_spans(exporter)
    phases = phases_of(exporter, request)
    assert [span.name for span in phases] == ["read", "route", "page_in"]
    assert [span.status.status_code for span in phases] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert (request.attributes or {})["http.response.status_code"] == 499
    assert_nothing_is_left(traced)


def test_failure_is_told_without_words(traced: LiveServer, exporter: InMemorySpanExporter) -> None:
    traced.engine.fail_with = EngineFailed(f"a step failed on {SECRET}")
    ask(traced)
    (request,) = request_spans(exporter)
    assert request.status.status_code == StatusCode.ERROR
    assert (request.attributes or {})["http.response.status_code"] == 500
    assert SECRET not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_health_and_metrics_are_not_traced(traced: LiveServer, exporter: InMemorySpanExporter) -> None:
    with traced.client() as client:
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            client.get(path)
        client.get("/v1/models")
    assert [span.name for span in request_spans(exporter)] == ["GET /v1/models"]


def test_share_of_requests_is_traced(exporter: InMemorySpanExporter) -> None:
    for ratio, expected in ((0.0, 0), (1.0, 20)):
        exporter.clear()
        tracer = OtelTracer(SimpleSpanProcessor(exporter), sample_ratio=ratio)
        for _ in range(20):
            tracer.begin({}).end(name="x", status=200, facts={})
        assert len(exporter.get_finished_spans()) == expected


def test_nothing_of_opentelemetry_is_imported_while_traces_are_off() -> None:
    code = (
        "import sys, server.config as c, server.logs, server.tracing as t\n"
        "assert t.open_tracer(c.TelemetrySettings(), version='0') is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    importers = [file.name for file in SERVER.rglob("*.py") if IMPORT.search(file.read_text())]
    assert importers == ["telemetry.py"]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigInvalid, match=r"telemetry\.otlp_endpoint: needs the extra `otel`"):
        open_tracer(TelemetrySettings(otlp_endpoint="http://localhost:4318"), version="0")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://host/otlp/v1/traces", "https://host/otlp/v1/traces"),
    ],
)
def test_endpoint_may_be_the_collector_or_its_place_for_traces(endpoint: str, url: str) -> None:
    assert _traces_url(endpoint) == url


def exporting() -> list[str]:
    """The threads that send spans, or wait for those that do."""
    return [thread.name for thread in threading.enumerate() if "Otel" in thread.name or "traces" in thread.name]


def test_collector_that_is_not_there_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "opentelemetry")
    with run_live_server(tmp_path, settings={"telemetry": {"otlp_endpoint": "http://127.0.0.1:9"}}) as server:
        assert server.chat().status_code == 200
        began = time.monotonic()
    assert time.monotonic() - began < 2 * CLOSE_SECONDS
    wait_until(lambda: not exporting(), what="nothing is tried any more")
