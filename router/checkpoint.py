"""The router file: network, feature settings, policy and what they were trained against. Alone knows its layout.

A safetensors file: the network's parameters in float32 under their own names, and one metadata entry "router" with the
rest as JSON. One entry, because safetensors writes several in random order and equal routers must have equal digests.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from safetensors import SafetensorError
from torch import Tensor

from router.errors import CheckpointIncompatible, CheckpointInvalid
from router.features import FeatureSettings
from router.network import MetaRouter
from router.policy import RoutingPolicy

FORMAT_VERSION: Final = 1
METADATA_KEY = "router"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1)]
Width = Annotated[int, Field(ge=1, le=2**20)]


class _Metadata(BaseModel):
    """What the file says besides its tensors. Every key must be there and no other may be."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format_version: Literal[1]
    kind: Literal["meta_router"]
    base_fingerprint: Name
    token_dim: Width
    hidden_dim: Width
    domains: tuple[Name, ...] = Field(min_length=1)
    features: FeatureSettings
    policy: RoutingPolicy
    stack_digests: dict[str, tuple[Digest, ...]]

    @field_validator("features", "policy", mode="before")
    @classmethod
    def _every_key_is_written(cls, value: object, field: ValidationInfo) -> object:
        """The defaults are for new routers: one that changes must not change what an old file means."""
        if isinstance(value, dict):
            parts = FeatureSettings if field.field_name == "features" else RoutingPolicy
            missing = sorted({part.name for part in fields(parts)} - value.keys())
            if missing:
                raise ValueError(f"lacks the keys {missing}")
        return value

    @model_validator(mode="after")
    def _domains_agree(self) -> Self:
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains {self.domains} must be unique")
        if set(self.stack_digests) != set(self.domains):
            raise ValueError(f"stack_digests has {sorted(self.stack_digests)}, domains has {sorted(self.domains)}")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class RouterCheckpoint:
    """All that serving needs to route as training did. `stack_digests` holds each domain's rounds in order."""

    network: MetaRouter
    settings: FeatureSettings
    policy: RoutingPolicy
    stack_digests: Mapping[str, tuple[str, ...]]
    base_fingerprint: str

    def save(self, path: Path) -> str:
        """Write the file whole or not at all and return the sha256 of its bytes.

        CheckpointInvalid, with nothing written, for what `load` would refuse.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        _check_tensors(path, tensors, self.network)
        file_bytes = safetensors.torch.save(tensors, {METADATA_KEY: self._metadata(path).model_dump_json()})
        _replace_file(path, file_bytes)
        return hashlib.sha256(file_bytes).hexdigest()

    @classmethod
    def load(cls, path: Path, *, base_fingerprint: str | None = None, expected_digest: str | None = None) -> Self:
        """Read a router file, on the CPU and in eval mode. Any departure from the format is CheckpointInvalid.

        Another base than `base_fingerprint`, or other bytes than `expected_digest`, is CheckpointIncompatible.
        """
        file_bytes = path.read_bytes()  # Once, so that what is checked is what is used.
        digest = hashlib.sha256(file_bytes).hexdigest()
        if expected_digest is not None and digest != expected_digest:
            raise CheckpointIncompatible(f"router file {path} has digest {digest}, not {expected_digest}")
        tensors = _read_tensors(path, file_bytes)
        metadata = _read_metadata(path, file_bytes)
        if base_fingerprint is not None and metadata.base_fingerprint != base_fingerprint:
            raise CheckpointIncompatible(
                f"router file {path} was trained on base {metadata.base_fingerprint!r}, not on {base_fingerprint!r}"
            )
        return cls(
            network=_build_network(path, metadata, tensors),
            settings=metadata.features,
            policy=metadata.policy,
            stack_digests=metadata.stack_digests,
            base_fingerprint=metadata.base_fingerprint,
        )

    def _metadata(self, path: Path) -> _Metadata:
        try:
            return _Metadata(
                format_version=FORMAT_VERSION,
                kind="meta_router",
                base_fingerprint=self.base_fingerprint,
                token_dim=self.network.token_dim,
                hidden_dim=self.network.hidden_dim,
                domains=self.network.domains,
                features=self.settings,
                policy=self.policy,
                stack_digests={name: tuple(digests) for name, digests in sorted(self.stack_digests.items())},
            )
        except ValidationError as error:
            raise CheckpointInvalid(f"router file {path} cannot be written: {_faults(error)}") from error


def _read_tensors(path: Path, file_bytes: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(file_bytes)
    except SafetensorError as error:
        raise CheckpointInvalid(f"{path} is not a safetensors file: {error}") from error
    except KeyError as error:  # safetensors knows types that torch has no name for.
        raise CheckpointInvalid(f"router file {path} has a tensor of the unknown type {error}") from error


def _read_metadata(path: Path, file_bytes: bytes) -> _Metadata:
    """The bytes must have passed `_read_tensors`, so their header is sound."""
    header_bytes = int.from_bytes(file_bytes[:8], "little")
    entries = json.loads(file_bytes[8 : 8 + header_bytes]).get("__metadata__", {})
    if set(entries) != {METADATA_KEY}:
        raise CheckpointInvalid(
            f"{path} is not a router file: its metadata has the keys {sorted(entries)}, not {METADATA_KEY!r} alone"
        )
    try:
        return _Metadata.model_validate_json(entries[METADATA_KEY])
    except ValidationError as error:
        raise CheckpointInvalid(f"router file {path} has wrong metadata: {_faults(error)}") from error


def _build_network(path: Path, metadata: _Metadata, tensors: Mapping[str, Tensor]) -> MetaRouter:
    with torch.device("meta"):  # No memory and no random numbers are spent on weights that the file replaces.
        network = MetaRouter(metadata.token_dim, metadata.domains, hidden_dim=metadata.hidden_dim)
    _check_tensors(path, tensors, network)
    network.to_empty(device="cpu").load_state_dict(tensors)
    return network.eval()


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], network: MetaRouter) -> None:
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointInvalid(f"router file {path} lacks the tensors {missing}")
    if extra:
        raise CheckpointInvalid(f"router file {path} has the foreign tensors {extra}")
    for name, tensor in tensors.items():
        shape = tuple(expected[name].shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointInvalid(f"router file {path}: tensor {name!r} has shape {tuple(tensor.shape)}, not {shape}")
        if tensor.dtype != torch.float32:
            raise CheckpointInvalid(f"router file {path}: tensor {name!r} is {tensor.dtype}, not torch.float32")
        if not tensor.isfinite().all():
            raise CheckpointInvalid(f"router file {path}: tensor {name!r} is not finite")


def _faults(error: ValidationError) -> str:
    """Every fault with its place, in one line."""
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'as a whole'}: {fault['msg']}" for fault in error.errors())


def _replace_file(path: Path, file_bytes: bytes) -> None:
    """A reader, or a crash at any instant, finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(file_bytes)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
