"""Says to whoever listens in which phase a request is. Knows phases and their order, and imports no OpenTelemetry."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Protocol

from server.config import TelemetrySettings
from server.errors import ConfigInvalid

ENGINE_PHASES = ("queue", "prefill", "decode")  # in their order; the server's own, read, route and page_in, come before


class RequestTrace(Protocol):
    """One request, from its first byte to its last."""

    @property
    def trace_id(self) -> str: ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A phase that lasts as long as the block."""
        ...

    def engine_done(self, seconds: Mapping[str, float]) -> None:
        """The engine's phases, by their seconds, of which the last ends now."""
        ...

    def end(self, *, name: str, status: int, facts: Mapping[str, str | int]) -> None: ...


class Tracer(Protocol):
    """Makes the traces of a server."""

    def begin(self, headers: Mapping[str, str]) -> RequestTrace:
        """The caller's trace goes on if the headers name one."""
        ...

    def close(self) -> None:
        """Sends what has not been sent yet, for a bounded time. Blocks."""
        ...


trace_var: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tells the request that runs here, if it is traced, that it is in this phase."""
    trace = trace_var.get()
    if trace is None:
        yield
        return
    with trace.phase(name):
        yield


def open_tracer(settings: TelemetrySettings, *, version: str) -> Tracer | None:
    """None without an endpoint: then nothing of OpenTelemetry is imported."""
    if settings.otlp_endpoint is None:
        return None
    try:
        telemetry = import_module("server.telemetry")
    except ModuleNotFoundError as error:
        raise ConfigInvalid(
            f"telemetry.otlp_endpoint: needs the extra `otel` of this package, {error.name!r} is not installed"
        ) from error
    tracer: Tracer = telemetry.otlp_tracer(settings.otlp_endpoint, settings.sample_ratio, version=version)
    return tracer
