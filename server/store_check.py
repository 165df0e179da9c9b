"""Compares a store's files with what its manifest says, without a server. Knows files; changes nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from router.checkpoint import RouterCheckpoint
from router.errors import RouterError
from stack_store.errors import StoreError
from stack_store.format import StackHeader, verify_stack
from stack_store.manifest import Manifest, RouterEntry, StackEntry, read_manifest

MANIFEST = "manifest.json"
FOLDERS = ("domains", "routers")  # where every file has to be named; other folders are no part of the store


@dataclass(frozen=True, slots=True)
class FileFinding:
    """What one file was found to be. `extra`: nothing names it, and nothing reads it."""

    kind: Literal["good", "bad", "missing", "extra"]
    file: str  # relative to the store
    said: str


def is_store(folder: Path) -> bool:
    """Whether a manifest says what has to be in it."""
    return (folder / MANIFEST).is_file()


def num_named_files(store: Path) -> int:
    """How many files the manifest names. ManifestInvalid."""
    return len(_named(read_manifest(store / MANIFEST)))


def check_store(store: Path) -> Iterator[FileFinding]:
    """Every byte of every file that the manifest names, then the files that it does not name. ManifestInvalid."""
    manifest = read_manifest(store / MANIFEST)
    for domain in manifest.domains:
        for stack in domain.stacks:
            yield _finding(stack.file, partial(_check_stack, store, manifest, domain.name, stack))
    if manifest.router is not None:
        yield _finding(manifest.router.file, partial(_check_router, store, manifest, manifest.router))
    named = _named(manifest)
    for path in sorted(path for folder in FOLDERS for path in (store / folder).rglob("*") if path.is_file()):
        if (file := str(path.relative_to(store))) not in named:
            yield FileFinding("extra", file, "the manifest does not name it")


def check_files(files: Sequence[Path]) -> Iterator[FileFinding]:
    """Stack files by themselves: whether each is whole."""
    for file in files:
        yield _finding(str(file), partial(_check_file, file))


def _named(manifest: Manifest) -> set[str]:
    named = {stack.file for domain in manifest.domains for stack in domain.stacks}
    return named if manifest.router is None else named | {manifest.router.file}


def _finding(file: str, check: Callable[[], str]) -> FileFinding:
    try:
        return FileFinding("good", file, check())
    except FileNotFoundError:
        return FileFinding("missing", file, "there is no such file")
    except (StoreError, RouterError) as error:
        return FileFinding("bad", file, str(error))
    except OSError as error:
        return FileFinding("bad", file, f"cannot be read: {error.strerror}")


def _check_file(file: Path) -> str:
    return _show(*verify_stack(file))


def _check_stack(store: Path, manifest: Manifest, domain: str, stack: StackEntry) -> str:
    header, digest = verify_stack(store / stack.file)
    if digest != stack.digest:
        raise StoreError(f"has the digest {digest}, the manifest names {stack.digest}")
    said = {
        "domain": (header.domain, domain),
        "round": (header.round, stack.round),
        "base": (header.base_fingerprint, manifest.base_fingerprint),
        "geometry": (header.geometry, manifest.geometry),
    }
    if wrong := [f"{name} {says!r} for {wanted!r}" for name, (says, wanted) in said.items() if says != wanted]:
        raise StoreError(f"has a header of another stack: {', '.join(wrong)}")
    return _show(header, digest)


def _check_router(store: Path, manifest: Manifest, router: RouterEntry) -> str:
    checkpoint = RouterCheckpoint.load(
        store / router.file, base_fingerprint=manifest.base_fingerprint, expected_digest=router.digest
    )
    return f"router of {', '.join(checkpoint.stack_digests)} digest={router.digest}"


def _show(header: StackHeader, digest: str) -> str:
    return f"domain={header.domain} round={header.round} digest={digest}"
