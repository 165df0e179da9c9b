"""Holds the server's metrics in a registry of its own. Knows their names, a contract; others say what happened.

Labels have few values: endpoints are route templates, and domains beyond the first hundred are `other`.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

MAX_DOMAIN_LABELS = 100
OTHER_DOMAIN = "other"
TIERS = ("device", "host")
FILE_SOURCE, HOST_SOURCE = "file", "host"

PHASES = ("queue", "route", "page_in", "prefill", "decode")

FAST_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
SLOW_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
WEIGHT_BUCKETS = (0.2, 0.4, 0.6, 0.8, 1.0)


class DomainLabels:
    """Names the first hundred domains; later ones share one label, so that a scrape stays small."""

    def __init__(self, limit: int = MAX_DOMAIN_LABELS) -> None:
        self._limit = limit
        self._named: set[str] = set()

    def label(self, domain: str) -> str:
        """The domain's own label, or `other`."""
        if domain not in self._named:
            if len(self._named) >= self._limit:
                return OTHER_DOMAIN
            self._named.add(domain)
        return domain


class _CountedElsewhere(Collector):
    """A counter that somebody else keeps."""

    def __init__(self, name: str, text: str, count: Callable[[], float]) -> None:
        self._name, self._text, self._count = name, text, count

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(f"brainstacks_{self._name}", self._text, value=self._count())


class TierMetrics:
    """The observer of one tier's cache."""

    def __init__(self, metrics: "ServerMetrics", tier: str, source: str, *, in_process: bool) -> None:
        """`source` is where the tier's loads come from; `in_process`, whether it lies in the process's own memory."""
        self._lookups = {hit: metrics.cache_lookups.labels(tier, "hit" if hit else "miss") for hit in (True, False)}
        self._evictions = metrics.cache_evictions.labels(tier)
        self._resident = metrics.cache_resident.labels(tier)
        self._failures = metrics.load_failures.labels(source)
        self._in_process = metrics.cache_in_process if in_process else None

    def lookup(self, hit: bool) -> None:
        self._lookups[hit].inc()

    def evicted(self, key: str, num_bytes: int) -> None:
        self._evictions.inc()

    def failed(self, key: str, error: Exception) -> None:
        self._failures.inc()

    def resident(self, num_bytes: int) -> None:
        self._resident.set(num_bytes)
        if self._in_process is not None:
            self._in_process.set(num_bytes)


class ServerMetrics:
    """Every metric of the server. Also the observer of downloads."""

    def __init__(self, *, version: str, base: str) -> None:
        self.registry = CollectorRegistry()
        self.domain_labels = DomainLabels()
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.requests = counter("requests_total", "Answered HTTP requests.", "endpoint", "status")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From request to first token.", SLOW_BUCKETS
        )
        self.inter_token = histogram("inter_token_seconds", "Between two tokens of one sequence.", FAST_BUCKETS)
        self.phase = histogram("phase_seconds", "What a request waited for.", SLOW_BUCKETS, "phase")
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens read.")
        self.completion_tokens = counter("completion_tokens_total", "Tokens generated.")
        self.requests_running = gauge("requests_running", "Sequences in the engine's batch.")
        self.requests_waiting = gauge("requests_waiting", "Sequences admitted but not in the batch yet.")
        self.kv_cache_used = gauge("kv_cache_used_ratio", "Share of the KV cache in use.")
        self.cache_lookups = counter("stack_cache_lookups_total", "Domains asked of a tier.", "tier", "result")
        self.cache_evictions = counter("stack_cache_evictions_total", "Domains evicted from a tier.", "tier")
        self.cache_resident = gauge("stack_cache_resident_bytes", "Bytes of domains in a tier.", "tier")
        self.cache_in_process = gauge(
            "stack_cache_process_bytes", "Bytes of domains in the process's own memory, which a GPU's is not."
        )
        self.cache_budget = gauge("stack_cache_budget_bytes", "Bytes that a tier may hold.", "tier")
        self.load_seconds = histogram("stack_load_seconds", "Time of one domain's load.", SLOW_BUCKETS, "source")
        self.load_bytes = counter("stack_load_bytes_total", "Bytes that loads have read.", "source")
        self.load_failures = counter("stack_load_failures_total", "Loads that failed.", "source")
        self.integrity_checks = counter(
            "stack_integrity_checks_total", "Registered files that were read again and hashed.", "result"
        )
        self.integrity_bytes = counter("stack_integrity_read_bytes_total", "Bytes that were read for it.")
        self.integrity_damaged = gauge("stack_integrity_damaged_files", "Files that are not what their digest names.")
        self.disk_faults = counter("store_disk_faults_total", "Changes of the store that the disk refused.", "fault")
        self.router_stale = gauge("router_stale_domains", "Domains whose stacks are others than the router knows.")
        self.download_bytes = counter("object_download_bytes_total", "Bytes that came from object storage.")
        self.download_failures = counter("object_download_failures_total", "Objects that could not be downloaded.")
        self.domain_selected = counter("domain_selected_total", "Prompts whose mix had the domain.", "domain")
        self.domain_weight = histogram(
            "domain_weight", "Weight of the domain where it was active.", WEIGHT_BUCKETS, "domain"
        )
        self.capability_gap = counter("capability_gap_total", "Routed prompts that no domain covers.")
        self.rate_limited = counter("rate_limited_total", "Requests refused by a rate limit.", "limit")
        for limit in ("requests", "tokens"):
            self.rate_limited.labels(limit)
        self.build_info = gauge("build_info", "Always 1; what runs here.", "version", "base")
        self.build_info.labels(version, base).set(1)
        self.heartbeat_age = gauge("engine_heartbeat_age_seconds", "Since the engine's thread last said that it lives.")
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._show_zeros()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def watch_load(
        self,
        *,
        heartbeat_age_seconds: Callable[[], float],
        running: Callable[[], float],
        waiting: Callable[[], float],
        kv_used_ratio: Callable[[], float],
        preempted: Callable[[], float],
        stale: Callable[[], float],
    ) -> None:
        """Reads these at every scrape."""
        self.heartbeat_age.set_function(heartbeat_age_seconds)
        self.registry.register(_CountedElsewhere("preemptions", "Sequences that gave up their KV blocks.", preempted))
        self.requests_running.set_function(running)
        self.requests_waiting.set_function(waiting)
        self.kv_cache_used.set_function(kv_used_ratio)
        self.router_stale.set_function(stale)

    def mix_chosen(self, mix: Mapping[str, float]) -> None:
        """A prompt is answered with this mix."""
        for domain, weight in mix.items():
            label = self.domain_labels.label(domain)
            self.domain_selected.labels(label).inc()
            self.domain_weight.labels(label).observe(weight)

    def loaded(self, source: str, num_bytes: int, seconds: float) -> None:
        """A domain came from files, whose bytes are fewer than the domain has once it is resident, or from the host."""
        self.load_bytes.labels(source).inc(num_bytes)
        self.load_seconds.labels(source).observe(seconds)

    def verified(self, num_bytes: int, *, is_good: bool) -> None:
        self.integrity_checks.labels("good" if is_good else "damaged").inc()
        self.integrity_bytes.inc(num_bytes)

    def downloaded(self, num_bytes: int) -> None:
        self.download_bytes.inc(num_bytes)

    def download_failed(self) -> None:
        self.download_failures.inc()

    def _show_zeros(self) -> None:
        """A series that appears with its first event hides that event from rate()."""
        for tier in TIERS:
            for result in ("hit", "miss"):
                self.cache_lookups.labels(tier, result)
            self.cache_evictions.labels(tier)
            self.cache_resident.labels(tier)
            self.cache_budget.labels(tier)
        for source in (FILE_SOURCE, HOST_SOURCE):
            self.load_seconds.labels(source)
            self.load_bytes.labels(source)
            self.load_failures.labels(source)
        for result in ("good", "damaged"):
            self.integrity_checks.labels(result)
        for fault in ("full", "failed"):
            self.disk_faults.labels(fault)
        for phase in PHASES:
            self.phase.labels(phase)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"brainstacks_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"brainstacks_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"brainstacks_{name}", text, labels, buckets=buckets, registry=self.registry)
