"""Measures a request as its events go by. Knows clocks and metrics, not what the tokens say."""

import time
from collections.abc import Callable, Mapping

from server.metrics import PHASES, ServerMetrics
from server.tracing import trace_var


class RequestMeter:
    """The times of one request: to its first token, between tokens, and by phase."""

    def __init__(self, metrics: ServerMetrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began = clock()
        self._trace = trace_var.get()
        self.num_tokens = 0  # that came so far
        self._last_token: dict[int, float] = {}

    def tokens_came(self, index: int, count: int) -> None:
        """`count` tokens of sequence `index` came just now; tokens that came together share the gap."""
        now = self._clock()
        self.num_tokens += count
        if not self._last_token:
            self._metrics.time_to_first_token.observe(now - self._began)
        if (last := self._last_token.get(index)) is not None:
            for _ in range(count):
                self._metrics.inter_token.observe((now - last) / count)
        self._last_token[index] = now

    def prompt_done(self, seconds: Mapping[str, float]) -> None:
        """A prompt's last sequence ended; `seconds` by phase."""
        for phase in PHASES:
            if phase in seconds:
                self._metrics.phase.labels(phase).observe(seconds[phase])
        if self._trace is not None:
            self._trace.engine_done(seconds)
