"""How the server's process ends, and what it has told until then: logs, traces, clients, supervisor."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import dropwhile
from pathlib import Path
from typing import Any

import openai
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from engine.engine import MAX_FAILED_STEPS
from tests.e2e.server_process import ServerProcess
from tests.servers import wait_until

QUESTION = "Is a zebra white with black stripes, or is it the other way round?"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes traces as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.spans: list[Any] = []
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class CollectorHandler(BaseHTTPRequestHandler):
    """Collector's requests."""

    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.add(self.path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Listener(threading.Thread):
    """A client that streams an answer to its end, whatever that is."""

    def __init__(self, server: ServerProcess, *, tokens: int, **headers: str) -> None:
        super().__init__()
        self.text = ""
        self.finish_reason: str | None = None
        self.error: openai.APIError | None = None
        self._stream = server.openai.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=tokens,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers=headers,
        )
        self.start()

    def run(self) -> None:
        try:
            for chunk in self._stream:
                for choice in chunk.choices:
                    self.text += choice.delta.content or ""
                    self.finish_reason = choice.finish_reason
        except openai.APIError as error:
            self.error = error


class LosesItsDevice(ServerProcess):
    """Whose engine fails for good at the eighth step."""

    command = (sys.executable, "-m", "tests.e2e.faulty_server", "lost")


class IsSlow(ServerProcess):
    """Whose engine needs ten milliseconds a step."""

    command = (sys.executable, "-m", "tests.e2e.faulty_server", "slow")


class GetsStuck(ServerProcess):
    """Whose engine's eighth step never ends."""

    command = (sys.executable, "-m", "tests.e2e.faulty_server", "stuck")


@contextmanager
def tiny_server(
    folder: Path, base: Path, kind: type[ServerProcess] = ServerProcess, **settings: object
) -> Iterator[ServerProcess]:
    """A server process with a tiny base and an empty store."""
    engine = {"engine__base": base, "engine__fused_step": False, "engine__max_model_len": 500}
    small = {"store__device_budget_bytes": 10**6, **engine, **settings}
    with kind(folder / "store", folder / "log", **small) as server:
        yield server


def test_sigterm_ends_the_server_when_its_answers_are_complete_and_logs_and_traces_tell_of_them(
    tmp_path: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    with collector() as traces:
        settings = {"server__drain_seconds": 50, "log__format": "json", "telemetry__otlp_endpoint": traces.url}
        with tiny_server(tmp_path, tiny_base_folder("llama"), IsSlow, **settings) as server:
            traceparent = f"00-{TRACE_ID}-{PARENT_ID}-01"
            listener = Listener(server, tokens=300, traceparent=traceparent)
            wait_until(lambda: len(listener.text) > 10, what="the answer has begun")
            server.terminate()
            wait_until(lambda: server.http.get("/health/ready").status_code == 503, what="it is not ready")
            refused = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
            assert listener.is_alive(), "the answer was too short to see it"
            assert server.http.get("/health/live").status_code == 200
            listener.join(timeout=60)
            assert listener.error is None
            assert listener.finish_reason == "length"
            assert server.wait() == 0
            log = server.log_text
    assert "zebra" not in log
    assert listener.text[:10] not in log
    # The fault is put in before the log is configured, and libraries say what they like until then.
    lines = [json.loads(line) for line in dropwhile(lambda line: line[0] != "{", log.splitlines())]
    (done,) = (line for line in lines if "completion_tokens" in line.get("fields", {}))
    assert (done["level"], done["trace_id"], done["fields"]["completion_tokens"]) == ("info", TRACE_ID, 300)
    assert traces.paths == {"/v1/traces"}
    spans = {span.name: span for span in traces.spans if span.trace_id.hex() == TRACE_ID}
    request = spans["POST /v1/chat/completions"]
    assert request.parent_span_id.hex() == PARENT_ID
    for phase in ("route", "page_in", "queue", "prefill", "decode"):
        assert spans[phase].parent_span_id == request.span_id
    assert "zebra" not in str(traces.spans)


def test_engine_that_fails_tells_its_clients_and_ends_the_process_with_an_error(
    tmp_path: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    with tiny_server(tmp_path, tiny_base_folder("llama"), LosesItsDevice) as server:
        for _ in range(MAX_FAILED_STEPS):
            listener = Listener(server, tokens=400)
            listener.join(timeout=60)
            assert listener.error is not None
            assert listener.error.code == "engine_failed"
        assert server.wait() == 1
        log = server.log_text
    assert "device lost" in log
    assert "engine ended by an error: the server ends too" in log
    assert "device lost" not in str(listener.error)


def test_engine_that_is_stuck_is_not_ready_and_does_not_keep_the_process(
    tmp_path: Path, tiny_base_folder: Callable[[str], Path]
) -> None:
    settings = {"server__heartbeat_timeout_seconds": 1.0, "server__drain_seconds": 0.3}
    with tiny_server(tmp_path, tiny_base_folder("llama"), GetsStuck, **settings) as server:
        listener = Listener(server, tokens=400)
        wait_until(lambda: server.http.get("/health/ready").status_code == 503, what="it is not ready")
        assert server.http.get("/health/ready").json()["status"] == "engine silent"
        assert server.http.get("/health/live").status_code == 200
        server.terminate()
        listener.join(timeout=60)
        assert listener.error is not None
        assert listener.error.code == "shutting_down"
        assert server.wait() == 1


def test_second_signal_ends_the_process_at_once(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> None:
    with tiny_server(tmp_path, tiny_base_folder("llama"), server__shutdown_delay_seconds=600) as server:
        server.terminate()
        wait_until(lambda: server.http.get("/health/ready").status_code == 503, what="it is not ready")
        began = time.monotonic()
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
