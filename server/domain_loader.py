"""Loads the domain that a cache key stands for, and counts what it reads. Knows versions and files, not leases."""

from dataclasses import dataclass

import torch

from engine.slots import ResidentDomain, load_domain
from server.catalog import Versions
from server.metrics import ServerMetrics
from stack_store.registry import StackRegistry


@dataclass(frozen=True, slots=True)
class DomainLoader:
    """The cache's `load`, called in its threads."""

    registry: StackRegistry
    versions: Versions
    metrics: ServerMetrics
    dtype: torch.dtype
    device: torch.device
    panelled: bool

    def __call__(self, key: str) -> ResidentDomain:
        """Raises what is wrong with the files."""
        entry = self.versions.entry(key)
        domain = load_domain(self.registry, entry, dtype=self.dtype, device=self.device, panelled=self.panelled)
        self.metrics.files_read(sum(stack.bytes for stack in entry.stacks))
        return domain
