"""Writes published stacks as stack files of ours. Knows one base and the settings, no store."""

from dataclasses import dataclass
from pathlib import Path

from engine.model.base import BaseIdentity
from server.errors import ReferenceRefused
from server.reference_import.published_folder import PublishedFolder
from server.reference_import.published_stack import PublishedStack, read_published_stack
from server.reference_import.settings import StackSettings
from stack_store.format import StackHeader, pack_groups, write_stack


@dataclass(frozen=True, slots=True)
class ConvertedStack:
    """One round as a file of ours, and how many tensors of the published file are not in it."""

    path: Path
    digest: str
    published_digest: str
    num_vision_tensors: int
    num_noise_tensors: int


def convert_stack(
    folder: PublishedFolder, file: str, path: Path, *, domain: str, round: int, base: BaseIdentity, how: StackSettings
) -> ConvertedStack:
    """Writes the published stack to `path`; equal arguments give equal bytes.

    Weights are rounded to bfloat16, the dtype of our stack files, through which the published inference reads its own.
    The header's recipe_digest is the sha256 of the published file. Raises ReferenceRefused, naming the fault.
    """
    stack, published_digest = _read(folder, file, base)
    header = _header(file, stack, published_digest, domain=domain, round=round, base=base, how=how)
    num_vision, num_noise = stack.num_vision_tensors, stack.num_noise_tensors
    groups = pack_groups(header, stack.projections)
    del stack  # as large as the groups
    return ConvertedStack(path, write_stack(path, header, groups), published_digest, num_vision, num_noise)


def _read(folder: PublishedFolder, file: str, base: BaseIdentity) -> tuple[PublishedStack, str]:
    """The stack and the digest of its file. The archive, twice as large as the stack, ends here."""
    archive = folder.load(file)
    return read_published_stack(file, archive.content, base.geometry), archive.digest


def _header(
    file: str, stack: PublishedStack, digest: str, *, domain: str, round: int, base: BaseIdentity, how: StackSettings
) -> StackHeader:
    try:
        return StackHeader(
            base_fingerprint=base.fingerprint,
            geometry=base.geometry,
            num_experts=stack.num_experts,
            rank=stack.rank,
            top_k=how.top_k,
            scale=how.scale_of(file, stack.rank),
            domain=domain,
            round=round,
            recipe_digest=digest,
            null_space_folded=False,
            weights="bf16",
        )
    except ValueError as error:
        raise ReferenceRefused(f"{file}: {error}") from error
