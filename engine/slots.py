"""Holds resident domains in device memory: one slot, a single flat allocation, a domain. Knows no requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engine.model.fused_step import array_of
from engine.model.moe_lora import ServingStack, host_memory, serving_stack, to_device
from engine.model.stack_unpacking import StackUnpacking, compile_unpacking
from stack_store.format import StackHeader, read_stack, resident_bytes
from stack_store.manifest import DomainEntry, StackEntry
from stack_store.registry import StackRegistry

ONE_PASS_DTYPES = (torch.bfloat16, torch.float32)  # others take the way of many small steps


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


def prepare_loads(dtype: torch.dtype) -> None:
    """Compiles what loads into this dtype need."""
    if dtype in ONE_PASS_DTYPES:
        compile_unpacking(array_of(torch.zeros(1, dtype=dtype)))


def load_domain(
    registry: StackRegistry, entry: DomainEntry, *, dtype: torch.dtype, device: torch.device, panelled: bool = False
) -> ResidentDomain:
    """Reads and checks every round of a domain and puts it on the device, in the dtype in which it is computed.

    `panelled` as the engine's `wants_panels` says.
    On CUDA the copies run in a stream of their own, beside the steps, and are complete when this returns.
    """
    with _copy_stream(device):
        stacks = tuple(
            _load_stack(registry, stack, dtype=dtype, device=device, panelled=panelled) for stack in entry.stacks
        )
    return ResidentDomain(name=entry.name, version=entry.version, stacks=stacks)


def _load_stack(
    registry: StackRegistry, stack: StackEntry, *, dtype: torch.dtype, device: torch.device, panelled: bool
) -> ServingStack:
    path = registry.stack_path(stack)
    if dtype not in ONE_PASS_DTYPES:
        read = read_stack(path, expected_digest=stack.digest, dtype=dtype)
        return serving_stack(read.header, read.groups, dtype=dtype, device=device, panelled=panelled)

    def begin(header: StackHeader) -> StackUnpacking:
        memory = host_memory(resident_bytes(header, dtype) // dtype.itemsize, dtype, device)
        return StackUnpacking(header, ServingStack.of(header, memory, panelled=panelled))

    host = registry.files.read(path, stack.digest, begin).stack
    return replace(host, memory=to_device(host.memory, device))


@contextmanager
def _copy_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
