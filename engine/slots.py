"""Holds resident domains in device memory: one slot, a single flat allocation, a domain. Knows no requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.model.moe_lora import ServingStack, serving_stack
from stack_store.format import read_stack
from stack_store.manifest import DomainEntry
from stack_store.registry import StackRegistry


@dataclass(frozen=True, slots=True, eq=False)
class ResidentDomain:
    """One version of a domain on the device. Its rounds always go together."""

    name: str
    version: str
    stacks: tuple[ServingStack, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory."""
        return sum(stack.num_bytes for stack in self.stacks)


def load_domain(
    registry: StackRegistry, entry: DomainEntry, *, dtype: torch.dtype, device: torch.device, panelled: bool = False
) -> ResidentDomain:
    """Reads and checks every round of a domain and puts it on the device, in the dtype in which it is computed.

    `panelled` as the engine's `wants_panels` says.
    On CUDA the copies run in a stream of their own, beside the steps, and are complete when this returns.
    """
    with _copy_stream(device):
        stacks = tuple(
            _load_stack(registry.stack_path(stack), digest=stack.digest, dtype=dtype, device=device, panelled=panelled)
            for stack in entry.stacks
        )
    return ResidentDomain(name=entry.name, version=entry.version, stacks=stacks)


def _load_stack(path: Path, *, digest: str, dtype: torch.dtype, device: torch.device, panelled: bool) -> ServingStack:
    stack = read_stack(path, expected_digest=digest, dtype=dtype)
    return serving_stack(stack.header, stack.groups, dtype=dtype, device=device, panelled=panelled)


@contextmanager
def _copy_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
