"""Metrics: labels stay few, registries stay apart."""

from server.meter import RequestMeter
from server.metrics import DomainLabels, ServerMetrics, TierMetrics
from tests.fakes import ManualClock


def test_domains_beyond_the_hundredth_share_a_label() -> None:
    labels = DomainLabels(limit=2)
    assert [labels.label(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    one, other = (ServerMetrics(version="1", base="tiny") for _ in range(2))
    one.mix_chosen({"math": 0.5})
    assert one.registry.get_sample_value("brainstacks_domain_selected_total", {"domain": "math"}) == 1
    assert other.registry.get_sample_value("brainstacks_domain_selected_total", {"domain": "math"}) is None


def test_events_of_a_tier_are_counted_as_its_own() -> None:
    metrics = ServerMetrics(version="1", base="tiny")
    host = TierMetrics(metrics, "host", "file", in_process=True)
    device = TierMetrics(metrics, "device", "host", in_process=False)
    host.lookup(True)
    host.evicted("math@1", 100)
    host.failed("math@1", ValueError("broken"))
    host.resident(300)
    device.resident(200)
    metrics.loaded("file", 100, 0.5)
    sample = metrics.registry.get_sample_value
    assert sample("brainstacks_stack_cache_lookups_total", {"tier": "host", "result": "hit"}) == 1
    assert sample("brainstacks_stack_cache_lookups_total", {"tier": "host", "result": "miss"}) == 0
    assert sample("brainstacks_stack_cache_lookups_total", {"tier": "device", "result": "hit"}) == 0
    assert sample("brainstacks_stack_load_bytes_total", {"source": "file"}) == 100
    assert sample("brainstacks_stack_load_seconds_sum", {"source": "file"}) == 0.5
    assert sample("brainstacks_stack_load_bytes_total", {"source": "host"}) == 0
    assert sample("brainstacks_stack_load_failures_total", {"source": "file"}) == 1
    assert sample("brainstacks_stack_load_failures_total", {"source": "host"}) == 0
    assert sample("brainstacks_stack_cache_evictions_total", {"tier": "host"}) == 1
    assert sample("brainstacks_stack_cache_resident_bytes", {"tier": "host"}) == 300
    assert sample("brainstacks_stack_cache_resident_bytes", {"tier": "device"}) == 200
    assert sample("brainstacks_stack_cache_process_bytes") == 300


def test_tokens_that_come_together_share_the_gap() -> None:
    clock, metrics = ManualClock(), ServerMetrics(version="1", base="tiny")
    meter = RequestMeter(metrics, clock=clock)
    clock.advance(1.0)
    meter.tokens_came(0, 1)
    clock.advance(0.5)
    meter.tokens_came(1, 1)
    clock.advance(0.5)
    meter.tokens_came(0, 2)
    sample = metrics.registry.get_sample_value
    assert sample("brainstacks_time_to_first_token_seconds_sum") == 1.0
    assert sample("brainstacks_time_to_first_token_seconds_count") == 1
    assert sample("brainstacks_inter_token_seconds_count") == 2
    assert sample("brainstacks_inter_token_seconds_sum") == 1.0


def test_downloads_are_counted_from_zero() -> None:
    metrics = ServerMetrics(version="1", base="tiny")
    sample = metrics.registry.get_sample_value
    assert sample("brainstacks_object_download_failures_total") == 0
    metrics.downloaded(100)
    metrics.downloaded(50)
    metrics.download_failed()
    assert sample("brainstacks_object_download_bytes_total") == 150
    assert sample("brainstacks_object_download_failures_total") == 1


def test_the_process_itself_is_measured() -> None:
    sample = ServerMetrics(version="1", base="tiny").registry.get_sample_value
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"):
        value = sample(name)
        assert value is not None, name
        assert value > 0, name
