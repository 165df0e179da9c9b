"""A host tier between files and device: what comes from where, what is counted, and what is let go of.

On a machine with a CUDA device the copies are real; elsewhere both tiers lie in the host's memory.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.slots import ResidentDomain
from server.catalog import Catalog, Versions
from server.domain_loader import DeviceLoader, FileLoader
from server.metrics import FILE_SOURCE, HOST_SOURCE, ServerMetrics, TierMetrics
from stack_store.cache import ResidentCache, Want
from stack_store.errors import LoadFailed
from tests.servers import make_store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAIT_SECONDS = 10.0


class Tiers:
    """A real store with a host tier for two of its three domains and room for one on the device."""

    def __init__(self, folder: Path, *, host_domains: float = 2, failure_ttl_seconds: float = 5.0) -> None:
        self.registry = make_store(folder / "store", folder / "import")
        self.versions = Versions()
        self.metrics = ServerMetrics(version="0", base="tiny")
        self.files = FileLoader(
            self.registry, self.versions, self.metrics, dtype=torch.float32, device=DEVICE, panelled=False
        )
        one = self.registry.resident_bytes(self.registry.domain("math"), torch.float32)
        self.host = ResidentCache[ResidentDomain](
            budget_bytes=int(host_domains * one),
            load=self.files,
            observer=TierMetrics(self.metrics, "host", FILE_SOURCE, in_process=True),
            failure_ttl_seconds=failure_ttl_seconds,
        )
        self.device = ResidentCache[ResidentDomain](
            budget_bytes=one,
            load=DeviceLoader(self.files, self.host),
            observer=TierMetrics(self.metrics, "device", HOST_SOURCE, in_process=False),
            failure_ttl_seconds=failure_ttl_seconds,
        )
        self.catalog = Catalog(
            self.registry, self.device, self.versions, dtype=torch.float32, lease_timeout_seconds=60, host=self.host
        )

    def want(self, name: str) -> Want:
        return self.catalog.want(self.registry.domain(name))

    def use(self, *names: str) -> None:
        """Leases and releases one domain after the other."""
        for name in names:
            lease = self.device.lease([self.want(name)]).result(WAIT_SECONDS)
            assert lease.values[0].name == name
            assert lease.values[0].stacks[0].memory.device.type == DEVICE.type
            lease.release()

    def count(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"brainstacks_{name}", labels)
        assert value is not None
        return value


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    made = Tiers(tmp_path)
    yield made
    made.catalog.close()
    for tier in (made.device, made.host):
        tier.check_integrity()
        assert tier.snapshot().leased_bytes == 0


def test_what_left_the_device_comes_back_from_the_host(tiers: Tiers) -> None:
    tiers.use("math", "code", "math", "code", "math")
    assert tiers.count("stack_load_seconds_count", source="file") == 2
    assert tiers.count("stack_cache_lookups_total", tier="device", result="miss") == 5
    assert tiers.count("stack_cache_lookups_total", tier="host", result="miss") == 2
    assert tiers.count("stack_cache_lookups_total", tier="host", result="hit") == 3
    assert tiers.count("stack_cache_evictions_total", tier="device") == 4
    assert tiers.count("stack_cache_evictions_total", tier="host") == 0


def test_each_tier_evicts_by_its_own_use(tiers: Tiers) -> None:
    tiers.use("math", "code", "chat", "code")
    assert tiers.count("stack_cache_evictions_total", tier="host") == 1
    tiers.use("math")
    assert tiers.count("stack_load_seconds_count", source="file") == 4


def test_a_domain_pinned_on_the_host_is_never_read_again(tiers: Tiers) -> None:
    want = tiers.want("math")
    tiers.host.pin(want.key, want.bytes).result(WAIT_SECONDS)
    tiers.use("code", "chat", "code", "chat", "math")
    assert tiers.count("stack_load_seconds_count", source="file") == 5  # math once, the others every time


def test_a_domain_that_the_host_has_no_room_for_goes_past_it(tmp_path: Path) -> None:
    tiers = Tiers(tmp_path, host_domains=0.5)
    tiers.use("math", "code")
    assert tiers.host.snapshot().entries == ()
    assert tiers.count("stack_load_seconds_count", source="file") == 2
    tiers.catalog.close()


def test_a_retired_version_leaves_both_tiers(tiers: Tiers) -> None:
    entry, want = tiers.registry.domain("math"), tiers.want("math")
    lease = tiers.device.lease([want]).result(WAIT_SECONDS)
    retired = tiers.catalog.retire(entry)
    assert not retired.done()
    assert tiers.host.is_resident(want.key)  # until the device has let go of it
    lease.release()
    assert retired.result(WAIT_SECONDS) == want.bytes
    assert not tiers.device.is_resident(want.key)
    assert not tiers.host.is_resident(want.key)


def test_a_file_that_cannot_be_read_is_counted_and_told_once_and_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tiers = Tiers(tmp_path, failure_ttl_seconds=0.0)
    tiers.want("math")
    path = tiers.registry.stack_path(tiers.registry.domain("math").stacks[0])
    path.rename(path.with_suffix(".away"))
    for _ in range(3):
        with pytest.raises(LoadFailed):
            tiers.use("math")
    assert tiers.count("stack_load_failures_total", source="file") == 3
    assert tiers.count("stack_load_failures_total", source="host") == 0
    told = [record for record in caplog.records if "domain load failed" in record.getMessage()]
    assert [record.levelname for record in told] == ["ERROR"]
    path.with_suffix(".away").rename(path)
    tiers.use("math")
    assert "domain load healed" in caplog.text
    tiers.catalog.close()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_cuda_the_host_tier_is_pinned_and_the_copy_has_the_same_bits(tiers: Tiers) -> None:
    tiers.use("math")
    want = tiers.want("math")
    on_host, on_device = (tier.lease([want]).result(WAIT_SECONDS) for tier in (tiers.host, tiers.device))
    host, device = on_host.values[0].stacks[0].memory, on_device.values[0].stacks[0].memory
    assert host.is_pinned()
    assert torch.equal(host, device.cpu())
    on_host.release()
    on_device.release()
