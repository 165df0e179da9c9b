"""Loads the domain that a cache key stands for, from one tier into the next. Knows versions and files, not requests.

With a host tier, files are read into pinned memory there and copied to the device from it; without one, a file's domain
goes straight to the device.
"""

import time
from dataclasses import dataclass

import torch

from engine.slot_memory import SlotMemory
from engine.slots import ResidentDomain, copy_domain, read_domain
from server.catalog import Versions
from server.metrics import FILE_SOURCE, HOST_SOURCE, ServerMetrics
from stack_store.cache import ResidentCache, Want
from stack_store.registry import StackRegistry


class FileLoader:
    """From files into host memory, pinned if the device is CUDA. A cache's `load`, called in its threads."""

    def __init__(
        self,
        registry: StackRegistry,
        versions: Versions,
        metrics: ServerMetrics,
        *,
        dtype: torch.dtype,
        device: torch.device,
        panelled: bool,
    ) -> None:
        self.metrics = metrics
        self.device = device
        self._registry = registry
        self._versions = versions
        self._dtype = dtype
        self._panelled = panelled
        self._memory = SlotMemory.for_copies_to(device)

    def __call__(self, key: str) -> ResidentDomain:
        """Raises what is wrong with the files, or MemoryError."""
        entry, began = self._versions.entry(key), time.monotonic()
        domain = read_domain(
            self._registry, entry, dtype=self._dtype, panelled=self._panelled, allocate=self._memory.allocate
        )
        self.metrics.loaded(FILE_SOURCE, sum(stack.bytes for stack in entry.stacks), time.monotonic() - began)
        return domain

    def want(self, key: str) -> Want:
        """What the domain takes of any tier."""
        return Want(key, self._registry.resident_bytes(self._versions.entry(key), self._dtype))


@dataclass(frozen=True, slots=True)
class DeviceLoader:
    """Into the device, from the host tier if there is one and the domain fits. A cache's `load`."""

    files: FileLoader
    host: ResidentCache[ResidentDomain] | None

    def __call__(self, key: str) -> ResidentDomain:
        """Raises what is wrong with the files, MemoryError, or what the host tier says."""
        want = self.files.want(key)
        if self.host is None or want.bytes > self.host.budget_bytes:
            return self._copy(self.files(key))
        lease = self.host.lease([want]).result()  # in a thread of this tier's own, so the host's loaders go on
        try:
            return self._copy(lease.values[0])
        finally:
            lease.release()

    def _copy(self, domain: ResidentDomain) -> ResidentDomain:
        if self.files.device.type == "cpu":  # where it is read is where it is computed
            return domain
        began = time.monotonic()
        copied = copy_domain(domain, self.files.device)
        self.files.metrics.loaded(HOST_SOURCE, domain.num_bytes, time.monotonic() - began)
        return copied
