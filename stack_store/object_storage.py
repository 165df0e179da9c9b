"""Reads pieces of objects under the allowed roots. Knows fsspec and its drivers; keeps nothing on the disk.

A driver's own words may hold an endpoint's secrets, so its errors are named by their class and never quoted.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stack_store.errors import (
    ImportRefused,
    ObjectDenied,
    ObjectNotFound,
    ObjectRefused,
    ObjectStorageInvalid,
    ObjectUnavailable,
)
from stack_store.import_path import open_import
from stack_store.object_url import FILE_SCHEME, ObjectUrl, check_root, check_url

EXTRAS = {"s3": "s3", "s3a": "s3"}  # by scheme, what to install for it

Options = Mapping[str, Mapping[str, Any]]


class StoredObject(Protocol):
    """One object that can be read piece by piece."""

    num_bytes: int

    def read(self, start: int, end: int) -> bytes:
        """At least one and at most `end - start` bytes from `start` on. Raises ObjectUnavailable and its siblings."""
        ...


class ObjectStorage:
    """The objects under some roots. Thread-safe."""

    def __init__(self, roots: Sequence[str], options: Options) -> None:
        """`options` has the driver's options by scheme. Raises ObjectStorageInvalid; connects to nothing yet."""
        self._roots = [check_root(root) for root in roots]
        schemes = {root.partition("://")[0] for root in self._roots} - {FILE_SCHEME}
        for scheme in sorted(options.keys() - schemes):
            raise ObjectStorageInvalid(f"options of {scheme!r}: no root has a scheme that takes options by this name")
        self._drivers = {scheme: _make_driver(scheme, options.get(scheme, {})) for scheme in sorted(schemes)}

    @property
    def has_roots(self) -> bool:
        return bool(self._roots)

    def check(self, url: str) -> ObjectUrl:
        """Raises ObjectRefused for what is not plainly under a root. Opens nothing."""
        return check_url(url, self._roots)

    @contextmanager
    def open(self, url: ObjectUrl) -> Iterator[StoredObject]:
        """The object. Raises ObjectNotFound, ObjectDenied or ObjectUnavailable, as reading it does."""
        if url.scheme == FILE_SCHEME:
            with _open_file(url) as file:
                yield _LocalObject(url, file)
        else:
            remote = _RemoteObject(url, self._drivers[url.scheme])
            try:
                yield remote
            finally:
                remote.close()


class _LocalObject:
    def __init__(self, url: ObjectUrl, file: BufferedReader) -> None:
        self._url = url
        self._descriptor = file.fileno()
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        with _told_apart(self._url):
            return _as_asked(self._url, os.pread(self._descriptor, end - start, start), end - start)


class _RemoteObject:
    def __init__(self, url: ObjectUrl, driver: fsspec.AbstractFileSystem) -> None:
        self._url = url
        with _told_apart(url):
            found = driver.info(url.text)
        if found["type"] != "file":
            raise ObjectNotFound(f"{url} is a {found['type']}, not an object")
        if not isinstance(found["size"], int):
            raise ObjectUnavailable(f"object {url} has no known length")
        self.num_bytes: int = found["size"]
        # Not cat_file, which for HTTP holds all that a server sends, though it was asked for a piece.
        with _told_apart(url):
            self._file = driver.open(url.text, "rb", cache_type="none")

    def read(self, start: int, end: int) -> bytes:
        with _told_apart(self._url):
            self._file.seek(start)
            chunk = self._file.read(end - start)
        return _as_asked(self._url, chunk, end - start)

    def close(self) -> None:
        self._file.close()


def _as_asked(url: ObjectUrl, chunk: bytes, num_bytes: int) -> bytes:
    """Without this, a server that ignores ranges would send the whole object for every piece of it."""
    if not 0 < len(chunk) <= num_bytes:
        raise ObjectUnavailable(f"object {url}: {num_bytes} bytes were asked for, {len(chunk)} came")
    return chunk


@contextmanager
def _told_apart(url: ObjectUrl) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):  # HTTP's driver could not connect
            raise ObjectUnavailable(f"object {url} can't be read: {type(cause).__name__}") from error
        raise ObjectNotFound(f"there is no object {url}") from error
    except PermissionError as error:
        raise ObjectDenied(f"the storage denies access to {url}, or has no such object") from error
    except Exception as error:  # every driver has errors of its own
        raise ObjectUnavailable(f"object {url} can't be read: {type(error).__name__}") from error


def _open_file(url: ObjectUrl) -> BufferedReader:
    root = Path(url.root.removeprefix(f"{FILE_SCHEME}://"))
    try:
        return open_import(root, url.relative)
    except ImportRefused as error:
        with _told_apart(url):
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | PermissionError):
                raise error.__cause__ from None
        raise ObjectRefused(f"url {url} is no regular file, or leaves its root through a link") from error


def _make_driver(scheme: str, options: Mapping[str, Any]) -> fsspec.AbstractFileSystem:
    try:
        driver_class = fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise ObjectStorageInvalid(f"root with scheme {scheme!r}: fsspec knows no such scheme") from error
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        install = f": pip install -c constraints.txt -e '.[{extra}]'" if extra else f": {error}"
        raise ObjectStorageInvalid(f"root with scheme {scheme!r}: its driver is not installed{install}") from error
    if issubclass(driver_class, LocalFileSystem):  # it would follow links out of the root
        raise ObjectStorageInvalid(f"root with scheme {scheme!r}: local files are named by {FILE_SCHEME}:///")
    try:
        # An instance of its own: the shared one may have other options, and remembers what was there.
        return driver_class(**{"skip_instance_cache": True, "use_listings_cache": False, **options})
    except Exception as error:  # a driver checks its options as it likes
        raise ObjectStorageInvalid(f"options of {scheme!r} are refused: {type(error).__name__}") from error
