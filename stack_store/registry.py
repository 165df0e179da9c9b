"""The durable side of a store: which domains exist, in which version. Knows files, not tensors' values or memory.

Longer than most files because the order of its writes is the promise: a crash leaves the old store or the new one.

Writers hold the lock of the store's folder, so that threads and processes take turns. Whoever has the store open holds
a share of its `domains` folder; the first to open it removes what a crash left, since nobody can be about to use it.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import torch

from stack_store.atomic import TEMPORARY_SUFFIX, StagedFile, flush_folder, make_folder, staged_file
from stack_store.errors import (
    DomainInvalid,
    DomainNotFound,
    DomainTooLarge,
    GenerationConflict,
    StackIncompatible,
    StoreExists,
    StoreNotFound,
)
from stack_store.format import Geometry, OpenStack, StackHeader, read_verified_header, resident_bytes
from stack_store.locks import FolderShare, exclusive_folder
from stack_store.manifest import (
    FORMAT_VERSION,
    DomainEntry,
    Manifest,
    RouterEntry,
    StackEntry,
    read_manifest,
    require_domain_name,
    router_file,
    stack_file,
    write_manifest,
)
from stack_store.stack_files import StackFiles
from stack_store.tensor_file import TensorFile

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Only such names are ever removed: a file that the store did not make is not its to delete.
TEMPORARY = rf"\.[0-9a-f]{{16}}{re.escape(TEMPORARY_SUFFIX)}"
OWN_FILES = {
    "*": re.compile(TEMPORARY),
    "domains/*": re.compile(TEMPORARY),
    "domains/*/*": re.compile(r"[0-9]+-[0-9a-f]{12}\.safetensors"),
    "routers/*": re.compile(r"[0-9a-f]{12}\.safetensors"),
}

Source = Path | BufferedReader


@dataclass(frozen=True, slots=True)
class Registration:
    """What register_domain did, or would do."""

    entry: DomainEntry
    previous: DomainEntry | None
    generation: int
    changed: bool


@dataclass(frozen=True, slots=True)
class Removal:
    """What remove_domain did. The files stay until unlink_version(entry)."""

    entry: DomainEntry
    generation: int


class StackRegistry:
    """Names domains and their stacks durably. Thread-safe, and safe beside other processes on the same folder."""

    def __init__(self, path: Path) -> None:
        """Use create or open."""
        self.path = path
        self.files = StackFiles()
        self._headers: dict[str, StackHeader] = {}
        self._share = FolderShare(path / "domains", when_alone=self._remove_leftovers)
        self._manifest = read_manifest(path / MANIFEST)
        self._seen: tuple[int, int, int] | None = None  # the file that look_again read last
        self._names: tuple[Manifest | None, Mapping[str, DomainEntry]] = None, {}

    @classmethod
    def create(cls, path: Path, *, base_fingerprint: str, geometry: Geometry) -> "StackRegistry":
        """An empty store for one base. Raises StoreExists."""
        path.mkdir(parents=True, exist_ok=True)
        with exclusive_folder(path):
            if (path / MANIFEST).exists():
                raise StoreExists(f"{path} is a store already")
            make_folder(path / "domains")
            make_folder(path / "routers")
            empty = Manifest(FORMAT_VERSION, base_fingerprint, geometry, domains=(), router=None, generation=0)
            # Written last: before it, the folder is no store.
            write_manifest(path / MANIFEST, empty)
        return cls(path)

    @staticmethod
    def is_unborn(path: Path) -> bool:
        """Whether the folder is missing, empty, or holds only what a `create` that was killed left: it may be made."""
        entries = list(path.iterdir()) if path.exists() else []
        return all(_is_of_creation(entry) for entry in entries)

    @classmethod
    def open(
        cls, path: Path, *, base_fingerprint: str | None = None, geometry: Geometry | None = None
    ) -> "StackRegistry":
        """The store at `path`. Raises StoreNotFound, ManifestInvalid, or StackIncompatible for another base's store."""
        if not (path / MANIFEST).is_file():
            raise StoreNotFound(f"{path} is not a store: it has no {MANIFEST}")
        manifest = read_manifest(path / MANIFEST)
        _require_base(f"store {path}", manifest.base_fingerprint, base_fingerprint or manifest.base_fingerprint)
        _require_geometry(f"store {path}", manifest.geometry, geometry or manifest.geometry)
        if not (path / "domains").is_dir():
            make_folder(path / "domains")  # a copy by git lacks it, for git keeps no empty folder
        return cls(path)

    def close(self) -> None:
        """Gives up the share, so that whoever opens the store next may tidy it. Idempotent."""
        self._share.close()

    @property
    def manifest(self) -> Manifest:
        """The store as this process last saw it; every write looks again."""
        return self._manifest

    @property
    def by_name(self) -> Mapping[str, DomainEntry]:
        """The domains of `manifest`, in its order. Built once for each manifest, because every request asks."""
        manifest, names = self._names
        if manifest is not self._manifest:
            manifest = self._manifest
            names = {domain.name: domain for domain in manifest.domains}
            self._names = manifest, names
        return names

    def look_again(self) -> None:
        """`manifest` is as new as the disk's, which another process may have written. Raises as read_manifest does."""
        stat = (self.path / MANIFEST).stat()
        seen = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if seen == self._seen:  # every manifest is a new file, and to parse a long one takes a while
            return
        manifest = read_manifest(self.path / MANIFEST)
        if manifest.generation > self._manifest.generation:  # never back, whoever else looked meanwhile
            self._manifest = manifest
        self._seen = seen

    def domain(self, name: str) -> DomainEntry:
        """Raises DomainNotFound."""
        if (entry := self.by_name.get(name)) is None:
            raise DomainNotFound(f"the store has no domain {name!r}")
        return entry

    def stack_path(self, entry: StackEntry) -> Path:
        return self.path / entry.file

    def router_path(self) -> Path | None:
        router = self._manifest.router
        return None if router is None else self.path / router.file

    def header(self, entry: StackEntry) -> StackHeader:
        """Read once per digest."""
        if entry.digest not in self._headers:
            self._headers[entry.digest] = read_verified_header(self.stack_path(entry), num_bytes=entry.bytes)
        return self._headers[entry.digest]

    def resident_bytes(self, domain: DomainEntry, dtype: torch.dtype) -> int:
        """The bytes of all rounds of the domain once they are in dtype."""
        return sum(resident_bytes(self.header(stack), dtype) for stack in domain.stacks)

    def register_domain(
        self,
        name: str,
        sources: Sequence[Source],
        *,
        expected_generation: int | None = None,
        dry_run: bool = False,
        max_resident_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Registration:
        """Adds the domain with these files as its rounds, or replaces it. On any error nothing has changed.

        Each file is read once, front to back, so what was verified is what was copied, whatever happens to the source
        meanwhile. An open file is read from its start and left open. The same stacks once more leave the generation as
        it is, but heal a damaged copy. `max_resident_bytes` bounds the domain's bytes in dtype.
        Raises DomainNameInvalid, DomainInvalid, StackInvalid, StackIncompatible, DomainTooLarge, GenerationConflict.
        """
        require_domain_name(name)
        with self._writing(expected_generation) as manifest, ExitStack() as cleanup:
            opened = _open_rounds(name, sources, manifest, cleanup)
            if max_resident_bytes is not None:
                _require_room(name, sum(resident_bytes(file.header, dtype) for file in opened), max_resident_bytes)
            copies = [] if dry_run else [self._stage(cleanup) for _ in opened]
            entry = DomainEntry(name, tuple(_verify_rounds(name, opened, copies)))
            changed = replace(manifest, domains=_with_domain(manifest, entry))
            if not dry_run:
                for stack, copy in zip(entry.stacks, copies, strict=True):
                    self._commit(copy, stack.file, cleanup)
                self._publish(changed)
            return Registration(
                entry=entry,
                previous=_find_domain(manifest, name),
                generation=self._manifest.generation,
                changed=changed != manifest,
            )

    def import_domains(
        self,
        domains: Mapping[str, Sequence[Source]],
        *,
        router: Source | None,
        expected_generation: int | None = None,
    ) -> Manifest:
        """Registers all domains, and sets the router if there is one, in one change: a crash leaves all of it or none.

        Each domain is checked as by register_domain, whose errors this raises.
        """
        for name in domains:
            require_domain_name(name)
        with self._writing(expected_generation) as manifest, ExitStack() as cleanup:
            changed, staged = manifest, []
            for name, sources in domains.items():
                opened = _open_rounds(name, sources, manifest, cleanup)
                copies = [self._stage(cleanup) for _ in opened]
                entry = DomainEntry(name, tuple(_verify_rounds(name, opened, copies)))
                changed = replace(changed, domains=_with_domain(changed, entry))
                staged += [(copy, stack.file) for copy, stack in zip(copies, entry.stacks, strict=True)]
            if router is not None:
                router_entry, copy = self._stage_router(router, cleanup)
                changed = replace(changed, router=router_entry)
                staged.append((copy, router_entry.file))
            for copy, file in staged:
                self._commit(copy, file, cleanup)
            self._publish(changed)
            return self._manifest

    def remove_domain(self, name: str, *, expected_generation: int | None = None) -> Removal:
        """The domain no longer exists, though its files do, for those who still use them. Raises DomainNotFound."""
        with self._writing(expected_generation) as manifest:
            entry = _require_domain(manifest, name)
            self._publish(replace(manifest, domains=tuple(domain for domain in manifest.domains if domain != entry)))
            return Removal(entry=entry, generation=self._manifest.generation)

    def unlink_version(self, entry: DomainEntry) -> int:
        """Deletes those files of the version that the store no longer names. Returns the bytes freed."""
        with self._writing(expected_generation=None) as manifest:
            named = {stack.digest for domain in manifest.domains for stack in domain.stacks}
            paths = [self.stack_path(stack) for stack in entry.stacks if stack.digest not in named]
            paths = [path for path in paths if path.exists()]
            num_bytes = sum(path.stat().st_size for path in paths)
            for path in paths:
                path.unlink()
            for stack in entry.stacks:
                self._headers.pop(stack.digest, None)
                self.files.forget(stack.digest)
            self._remove_if_unused(self.path / "domains" / entry.name)
            return num_bytes

    def set_router(self, source: Source, *, expected_generation: int | None = None) -> Manifest:
        """Copies a router file into the store and makes it the active one. Its content is the router's own affair."""
        with self._writing(expected_generation) as manifest, ExitStack() as cleanup:
            entry, staged = self._stage_router(source, cleanup)
            self._commit(staged, entry.file, cleanup)
            self._publish(replace(manifest, router=entry))
            return self._manifest

    @contextmanager
    def _writing(self, expected_generation: int | None) -> Iterator[Manifest]:
        with exclusive_folder(self.path):
            self._manifest = read_manifest(self.path / MANIFEST)  # another process may have written it
            if expected_generation not in (None, self._manifest.generation):
                raise GenerationConflict(expected=expected_generation, current=self._manifest.generation)
            yield self._manifest

    def _stage(self, cleanup: ExitStack) -> StagedFile:
        return cleanup.enter_context(staged_file(self.path / "domains"))

    def _stage_router(self, source: Source, cleanup: ExitStack) -> tuple[RouterEntry, StagedFile]:
        file, staged = _open_file(source, cleanup), self._stage(cleanup)
        digest = TensorFile(file, name=str(file.name)).verify(copy_to=staged.file)
        return RouterEntry(digest=digest, file=router_file(digest), bytes=staged.file.tell()), staged

    def _commit(self, staged: StagedFile, file: str, cleanup: ExitStack) -> None:
        """The file has its name; with `cleanup` it goes again unless the manifest names it by then."""
        make_folder((self.path / file).parent)
        cleanup.callback(self._remove_unnamed, file)
        staged.commit(self.path / file)

    def _remove_unnamed(self, file: str) -> None:
        if file not in _named_files(self._manifest):
            (self.path / file).unlink(missing_ok=True)
            self._remove_if_unused((self.path / file).parent)

    def _remove_if_unused(self, folder: Path) -> None:
        """The folder of a registered domain stays, though its files be gone: whoever puts them back needs it."""
        if folder.parent.name == "domains" and _find_domain(self._manifest, folder.name) is None:
            _remove_if_empty(folder)

    def _publish(self, changed: Manifest) -> None:
        """Last step of every write: until here, the store is the old one."""
        if changed != self._manifest:
            changed = replace(changed, generation=self._manifest.generation + 1)
            write_manifest(self.path / MANIFEST, changed)
            self._manifest = changed

    def _remove_leftovers(self) -> None:
        named = _named_files(read_manifest(self.path / MANIFEST))
        for pattern, own in OWN_FILES.items():
            for path in self.path.glob(pattern):
                if path.is_file() and own.fullmatch(path.name) and str(path.relative_to(self.path)) not in named:
                    logger.info("leftover file removed path=%s", path)
                    path.unlink()
        for folder in (self.path / "domains").iterdir():
            _remove_if_empty(folder)


def _named_files(manifest: Manifest) -> set[str]:
    named = {stack.file for domain in manifest.domains for stack in domain.stacks}
    return named if manifest.router is None else named | {manifest.router.file}


def _is_of_creation(path: Path) -> bool:
    if path.name in ("domains", "routers"):
        return path.is_dir() and not any(path.iterdir())
    return path.is_file() and OWN_FILES["*"].fullmatch(path.name) is not None


def _open_file(source: Source, cleanup: ExitStack) -> BufferedReader:
    if isinstance(source, Path):
        return cleanup.enter_context(source.open("rb"))
    source.seek(0)
    return source


def _open_source(source: Source, cleanup: ExitStack) -> OpenStack:
    file = _open_file(source, cleanup)
    return OpenStack(file, name=str(file.name))


def _open_rounds(name: str, sources: Sequence[Source], manifest: Manifest, cleanup: ExitStack) -> list[OpenStack]:
    """The domain's stacks, whose headers fit each other and the store."""
    opened = [_open_source(source, cleanup) for source in sources]
    _require_rounds(name, [file.header for file in opened])
    for file in opened:
        _require_base(file.name, file.header.base_fingerprint, manifest.base_fingerprint)
        _require_geometry(file.name, file.header.geometry, manifest.geometry)
    return opened


def _verify_rounds(name: str, opened: Sequence[OpenStack], copies: Sequence[StagedFile]) -> Iterator[StackEntry]:
    """Reads every byte of the stacks, and writes it to their copies if there are any."""
    for round, stack in enumerate(opened, start=1):
        digest = stack.verify(copy_to=copies[round - 1].file if copies else None)
        yield StackEntry(digest=digest, file=stack_file(name, round, digest), bytes=stack.num_bytes, round=round)


def _find_domain(manifest: Manifest, name: str) -> DomainEntry | None:
    return next((domain for domain in manifest.domains if domain.name == name), None)


def _require_domain(manifest: Manifest, name: str) -> DomainEntry:
    entry = _find_domain(manifest, name)
    if entry is None:
        raise DomainNotFound(f"the store has no domain {name!r}")
    return entry


def _with_domain(manifest: Manifest, entry: DomainEntry) -> tuple[DomainEntry, ...]:
    """The domains with this one in its place, or at the end if it is new."""
    previous = _find_domain(manifest, entry.name)
    if previous is None:
        return (*manifest.domains, entry)
    return tuple(entry if domain == previous else domain for domain in manifest.domains)


def _require_rounds(name: str, headers: Sequence[StackHeader]) -> None:
    if not headers:
        raise DomainInvalid(f"domain {name!r} needs at least one stack")
    for header in headers:
        if header.domain != name:
            raise DomainInvalid(f"domain {name!r} is given a stack of domain {header.domain!r}")
    rounds = [header.round for header in headers]
    if rounds != list(range(1, len(rounds) + 1)):
        raise DomainInvalid(f"domain {name!r} is given the rounds {rounds}, must be 1 to {len(rounds)} in order")


def _require_base(label: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise StackIncompatible(f"{label} is for base {theirs!r}, not for {ours!r}")


def _require_geometry(label: str, theirs: Geometry, ours: Geometry) -> None:
    if theirs != ours:
        raise StackIncompatible(f"{label} fits a base of {theirs}, not of {ours}")


def _require_room(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise DomainTooLarge(f"domain {name!r} needs {num_bytes} bytes, the budget is {max_bytes}")


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        flush_folder(folder.parent)
