"""Holds resident domains in memory: one slot, a single flat allocation, a stack. Knows no requests or budgets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.model.fused_step import array_of
from engine.model.moe_lora import ServingStack, serving_stack, to_device
from engine.model.stack_unpacking import StackUnpacking, compile_unpacking
from engine.slot_memory import SlotMemory
from stack_store.format import StackHeader, read_stack, resident_bytes
from stack_store.manifest import DomainEntry, StackEntry
from stack_store.registry import StackRegistry

ONE_PASS_DTYPES = (torch.bfloat16, torch.float32)  # others take the way of many small steps
CPU = torch.device("cpu")

Allocate = Callable[[int, torch.dtype], Tensor]  # (values, dtype) -> flat memory; MemoryError


@dataclass(frozen=True, slots=True, eq=False)
class ResidentDomain:
    """One version of a domain in the memory of one tier. Its rounds always go together."""

    name: str
    version: str
    stacks: tuple[ServingStack, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of that memory."""
        return sum(stack.num_bytes for stack in self.stacks)


def prepare_loads(dtype: torch.dtype) -> None:
    """Compiles what loads into this dtype need."""
    if dtype in ONE_PASS_DTYPES:
        compile_unpacking(array_of(torch.zeros(1, dtype=dtype)))


def load_domain(
    registry: StackRegistry, entry: DomainEntry, *, dtype: torch.dtype, device: torch.device, panelled: bool = False
) -> ResidentDomain:
    """Reads and checks every round of a domain and puts it on the device, in the dtype in which it is computed.

    `panelled` as the engine's `wants_panels` says. Raises what is wrong with the files, or MemoryError.
    """
    return copy_domain(read_domain(registry, entry, dtype=dtype, panelled=panelled), device)


def read_domain(
    registry: StackRegistry,
    entry: DomainEntry,
    *,
    dtype: torch.dtype,
    panelled: bool = False,
    allocate: Allocate | None = None,
) -> ResidentDomain:
    """As `load_domain`, into host memory that `allocate` gives, by default new memory."""
    allocate = allocate or SlotMemory().allocate
    stacks = (_read_stack(registry, stack, dtype, panelled=panelled, allocate=allocate) for stack in entry.stacks)
    return ResidentDomain(name=entry.name, version=entry.version, stacks=tuple(stacks))


def copy_domain(domain: ResidentDomain, device: torch.device) -> ResidentDomain:
    """A domain of host memory on the device; on a CPU the domain itself. Raises MemoryError.

    On CUDA the copies run in a stream of their own, beside the steps, and are complete when this returns.
    """
    if device.type == "cpu":
        return domain
    try:
        with _copy_stream(device):
            stacks = [replace(stack, memory=to_device(stack.memory, device)) for stack in domain.stacks]
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"no device memory for {domain.num_bytes} bytes") from error
    return replace(domain, stacks=tuple(stacks))


def _read_stack(
    registry: StackRegistry, stack: StackEntry, dtype: torch.dtype, *, panelled: bool, allocate: Allocate
) -> ServingStack:
    path = registry.stack_path(stack)
    if dtype not in ONE_PASS_DTYPES:
        read = read_stack(path, expected_digest=stack.digest, dtype=dtype)
        host = serving_stack(read.header, read.groups, dtype=dtype, device=CPU, panelled=panelled)
        return replace(host, memory=allocate(host.memory.numel(), dtype).copy_(host.memory))

    def begin(header: StackHeader) -> StackUnpacking:
        memory = allocate(resident_bytes(header, dtype) // dtype.itemsize, dtype)
        return StackUnpacking(header, ServingStack.of(header, memory, panelled=panelled))

    return registry.files.read(path, stack.digest, begin).stack


@contextmanager
def _copy_stream(device: torch.device) -> Iterator[None]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also after an error: what is being copied must stay until the copy is over
        stream.synchronize()
