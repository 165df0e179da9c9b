"""Reads the manifest of a published store. Knows which files make up which domain, not what is in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ReferenceRefused
from server.reference_import.published_folder import PublishedFolder
from stack_store.errors import DomainNameInvalid
from stack_store.manifest import require_domain_name

Text = Annotated[str, Field(min_length=1)]


class _Domain(BaseModel):
    """The last four fields are a report of the training, which nothing here reads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text
    num_inner_stacks: int = Field(ge=1)
    stack_files: list[Text]
    dataset: Any = None
    final_val_loss: Any = None
    val_losses_per_round: Any = None
    time_min: Any = None


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    domains: list[_Domain] = Field(min_length=1)
    total_stacks: int


@dataclass(frozen=True, slots=True)
class PublishedDomain:
    """A domain and the file of each round, in order, relative to the published folder."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PublishedStore:
    """The base's name and the domains, in the order in which they were trained."""

    model: str
    domains: tuple[PublishedDomain, ...]

    @property
    def num_stacks(self) -> int:
        return sum(len(domain.files) for domain in self.domains)


def read_published_store(folder: PublishedFolder, manifest: str) -> PublishedStore:
    """The store that the manifest at that path in the folder describes, with every stack file found.

    Raises ReferenceRefused, naming key and value, for a manifest that is not as published or does not agree with
    itself, and for a file that is missing, outside of the folder, or named twice.
    """
    path = folder.find("the manifest", [manifest])
    try:
        content = _Manifest.model_validate_json(folder.read_bytes(path))
    except ValidationError as error:
        raise ReferenceRefused(f"{path}: {'; '.join(_faults(error))}") from error
    _require_agreement(path, content)
    domains = tuple(PublishedDomain(d.name, tuple(_find_rounds(folder, d))) for d in content.domains)
    _require_own_files(folder, domains)
    return PublishedStore(content.model, domains)


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        place = ".".join(map(str, fault["loc"])) or "as a whole"
        shown = "" if fault["type"] in ("missing", "json_invalid") else f", got {fault['input']!r}"
        yield f"{place}: {fault['msg']}{shown}"


def _require_agreement(path: str, content: _Manifest) -> None:
    names = [domain.name for domain in content.domains]
    if len(set(names)) < len(names):
        raise ReferenceRefused(f"{path}: a domain appears twice in {names}")
    for domain in content.domains:
        try:
            require_domain_name(domain.name)
        except DomainNameInvalid as error:
            raise ReferenceRefused(f"{path}: {error}") from error
        if domain.num_inner_stacks != len(domain.stack_files):
            raise ReferenceRefused(
                f"{path}: domain {domain.name!r} has num_inner_stacks {domain.num_inner_stacks} and "
                f"{len(domain.stack_files)} stack_files"
            )
    num_stacks = sum(len(domain.stack_files) for domain in content.domains)
    if content.total_stacks != num_stacks:
        raise ReferenceRefused(f"{path}: total_stacks is {content.total_stacks}, the domains have {num_stacks}")


def _find_rounds(folder: PublishedFolder, domain: _Domain) -> Iterator[str]:
    """Recorded paths are those of the machine that trained; a published folder has the files by domain."""
    for round, recorded in enumerate(domain.stack_files, start=1):
        name = PurePosixPath(recorded).name
        candidates = dict.fromkeys([recorded, f"stacks/{domain.name}/{name}", f"{domain.name}/{name}"])
        yield folder.find(f"the stack of round {round} of domain {domain.name!r}", list(candidates))


def _require_own_files(folder: PublishedFolder, domains: tuple[PublishedDomain, ...]) -> None:
    """A file that stands for two rounds would be added twice."""
    owners: dict[Path, str] = {}
    for domain in domains:
        for round, file in enumerate(domain.files, start=1):
            owner = f"round {round} of domain {domain.name!r}"
            other = owners.setdefault(folder.real_path(file), owner)
            if other != owner:
                raise ReferenceRefused(f"{file} is the stack of {other} and of {owner}")
