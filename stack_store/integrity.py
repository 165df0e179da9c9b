"""Finds registered files that are not what their digest names any more. Knows bytes and a rate, not what a file means.

Files are read again and again in the background, past the page cache where the file system allows it: what is to be
found is what the disk has, and the pages of the domains in use stay where they are.
"""

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stack_store.manifest import DomainEntry, RouterEntry, StackEntry
from stack_store.registry import StackRegistry

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20  # a multiple of every block size, which reads past the page cache want

Registered = StackEntry | RouterEntry


class IntegrityObserver(Protocol):
    """Hears what checks find, to count it."""

    def verified(self, num_bytes: int, *, is_good: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What one file was found to be; `fault` is None if it is what its digest names."""

    file: str  # relative to the store
    digest: str
    fault: str | None


class IntegrityCheck:
    """The one who looks. Thread-safe."""

    def __init__(
        self, registry: StackRegistry, observer: IntegrityObserver, *, bytes_per_second: int, interval_seconds: float
    ) -> None:
        """At most so many bytes a second, 0 for none; a pass over all files begins at most every so many seconds."""
        self._registry = registry
        self._observer = observer
        self._bytes_per_second = bytes_per_second
        self._interval_seconds = interval_seconds
        self._faults: dict[str, FileCheck] = {}  # by digest
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="integrity", daemon=True)

    def start(self) -> None:
        """Begins to look in the background, if there is a rate."""
        if self._bytes_per_second:
            self._thread.start()

    def close(self) -> None:
        """Ends the background thread. Idempotent."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def num_damaged(self) -> int:
        """Registered files that the latest look found damaged."""
        named = {entry.digest for entry in self._registered()}
        return sum(digest in named for digest in list(self._faults))

    def faults_of(self, domain: DomainEntry) -> list[FileCheck]:
        """What the latest looks found wrong with the domain's files."""
        return [fault for stack in domain.stacks if (fault := self._faults.get(stack.digest)) is not None]

    def check_domain(self, domain: DomainEntry) -> list[FileCheck]:
        """Looks at a domain's files now, as fast as they can be read."""
        return [self._check(stack, lambda num_bytes: None) for stack in domain.stacks]

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            for entry in list(self._registered()):
                self._check(entry, self._pace)
                if self._stopping.is_set():
                    return
            self._stopping.wait(max(0.0, began + self._interval_seconds - time.monotonic()))

    def _registered(self) -> Iterator[Registered]:
        manifest = self._registry.manifest
        for domain in manifest.domains:
            yield from domain.stacks
        if manifest.router is not None:
            yield manifest.router

    def _check(self, entry: Registered, pace: Callable[[int], None]) -> FileCheck:
        try:
            digest = digest_on_disk(self._registry.path / entry.file, pace)
            fault = None if digest == entry.digest else f"has the digest {digest}"
        except InterruptedError:
            return FileCheck(entry.file, entry.digest, None)
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        check = FileCheck(entry.file, entry.digest, fault)
        if entry in self._registered():  # else it was replaced or deleted meanwhile, and its file with it
            self._note(check, entry.bytes)
        return check

    def _note(self, check: FileCheck, num_bytes: int) -> None:
        """Each fault is told once, and once that it is gone."""
        known = self._faults.pop(check.digest, None)
        if check.fault is not None:
            self._faults[check.digest] = check
            self._registry.files.forget(check.digest)  # so that the next load hashes all bytes, and refuses them
            if known is None:
                logger.error("registered file damaged file=%s fault=%r", check.file, check.fault)
        elif known is not None:
            logger.info("registered file good again file=%s", check.file)
        self._observer.verified(num_bytes, is_good=check.fault is None)

    def _pace(self, num_bytes: int) -> None:
        if self._stopping.wait(num_bytes / self._bytes_per_second):
            raise InterruptedError("the server ends")


def digest_on_disk(path: Path, pace: Callable[[int], None]) -> str:
    """The sha256 of a file's bytes as the disk has them. `pace` hears of every piece and may raise to end it."""
    buffer, sha256 = mmap.mmap(-1, CHUNK_BYTES), hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _read_past_page_cache(descriptor, is_wanted=True)
        done, num_bytes = 0, os.fstat(descriptor).st_size
        while done < num_bytes:
            count = _read_piece(descriptor, buffer, done)
            if count == 0:
                break  # it shrank, which the digest tells
            with memoryview(buffer) as view:
                sha256.update(view[:count])
            done += count
            pace(count)
        return sha256.hexdigest()
    finally:
        os.close(descriptor)


def _read_piece(descriptor: int, buffer: mmap.mmap, offset: int) -> int:
    try:
        return os.preadv(descriptor, [buffer], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _read_past_page_cache(descriptor, is_wanted=False)  # said to be possible, and is not
        return os.preadv(descriptor, [buffer], offset)


def _read_past_page_cache(descriptor: int, *, is_wanted: bool) -> None:
    """Not every file system can; then the page cache must do."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if is_wanted else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
