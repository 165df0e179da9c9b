"""Stores of many domains that take no room: stack files of zeros, with holes on the disk, of real size and digest."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.model.moe_lora import MoeLoraConfig
from stack_store.format import Geometry, ProjectionTensors, pack_groups, write_stack
from stack_store.manifest import DomainEntry, StackEntry, stack_file, write_manifest
from stack_store.registry import MANIFEST, StackRegistry
from tests.stacks import header_for

PAPER = MoeLoraConfig()


def add_sparse_domains(
    store: Path, names: Sequence[str], *, fingerprint: str, geometry: Geometry, config: MoeLoraConfig = PAPER
) -> None:
    """Registers domains of one stack each, as if they had been registered one by one. The store must be closed."""
    if not (store / MANIFEST).exists():
        StackRegistry.create(store, base_fingerprint=fingerprint, geometry=geometry).close()
    registry = StackRegistry.open(store)
    entries = [_sparse_domain(store, name, fingerprint, geometry, config) for name in names]
    manifest = registry.manifest
    write_manifest(store / MANIFEST, replace(manifest, domains=(*manifest.domains, *entries), generation=2))
    registry.close()


def _sparse_domain(store: Path, name: str, fingerprint: str, geometry: Geometry, config: MoeLoraConfig) -> DomainEntry:
    header = header_for(geometry, config, fingerprint=fingerprint, domain=name)
    template = store / f"template-{config.rank}-{len(name)}"
    if not template.exists():
        write_stack(template, header, pack_groups(header, _zeros(geometry, config)))
        # One that differs in its name alone, which every head has at the same place.
        template.with_suffix(".name").write_text(name)
    num_bytes, old_name = template.stat().st_size, template.with_suffix(".name").read_text()
    with template.open("rb") as file:
        head_bytes = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(head_bytes).replace(f'"domain":"{old_name}"'.encode(), f'"domain":"{name}"'.encode())
    assert len(head) == head_bytes
    digest = hashlib.sha256(head)
    zeros, left = bytes(1 << 20), num_bytes - head_bytes
    while left:
        digest.update(memoryview(zeros)[: min(left, len(zeros))])
        left -= min(left, len(zeros))
    path = store / stack_file(name, 1, digest.hexdigest())
    path.parent.mkdir(parents=True)
    with path.open("wb") as file_of_zeros:
        file_of_zeros.write(head)
        file_of_zeros.truncate(num_bytes)
    stack = StackEntry(digest.hexdigest(), stack_file(name, 1, digest.hexdigest()), num_bytes, 1)
    return DomainEntry(name, (stack,))


def _zeros(geometry: Geometry, config: MoeLoraConfig) -> dict[tuple[int, str], ProjectionTensors]:
    experts, rank = config.num_experts, config.rank
    return {
        (layer, name): ProjectionTensors(
            a=torch.zeros(experts, rank, num_in),
            b=torch.zeros(experts, num_out, rank),
            gate=torch.zeros(experts, num_in),
        )
        for layer in range(geometry.num_layers)
        for name, (num_in, num_out) in geometry.shapes.items()
    }
