"""Keeps features in one sqlite file, known by what they depend on, so that a second training need not compute them.

Knows tensors and keys, no router. Values are float16, or float32 where float16 has no such number.
Legend: T tokens, H hidden size of the base.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.errors import FeaturesInvalid

FORMAT_VERSION = 1
FeatureKey = bytes


class FeatureCache:
    """Features that survive a kill: what was put is durable when `put` returns."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use open_feature_cache."""
        self._connection, self._path = connection, path

    def get(self, key: FeatureKey) -> Tensor | None:
        """(T, H) float16 or float32, or None. Raises FeaturesInvalid if they are not what was put."""
        with _naming(self._path):
            query = "SELECT width, dtype, digest, content FROM features WHERE key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        width, dtype, digest, content = row
        if hashlib.sha256(content).digest() != digest:
            raise FeaturesInvalid(f"{self._path}: the features of key {key.hex()} are damaged; remove the file")
        return torch.from_numpy(np.frombuffer(content, dtype=dtype).reshape(-1, width).copy())

    def put(self, features: Mapping[FeatureKey, Tensor]) -> None:
        """Adds these in one transaction; they must be as `compact` gives them."""
        rows = [(key, *_row(tensor)) for key, tensor in features.items()]
        with _naming(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", rows)


@contextmanager
def open_feature_cache(path: Path) -> Iterator[FeatureCache]:
    """The cache at `path`, made if it is not there. Raises FeaturesInvalid that names a damaged or foreign file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        connection = sqlite3.connect(path)
    with closing(connection):
        with _naming(path):
            _settle(connection, path)
        yield FeatureCache(connection, path)


def compact(features: Tensor) -> Tensor:
    """(T, H) -> the same on the CPU in float16, or in float32 if a number is too large for that."""
    half = features.half()
    return (half if half.isfinite().all() else features.float()).cpu().contiguous()


def _row(features: Tensor) -> tuple[int, str, bytes, bytes]:
    values = features.numpy()
    content = values.tobytes()
    return values.shape[1], values.dtype.name, hashlib.sha256(content).digest(), content


def _settle(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the table in a new file, and checks an old one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not tables and not version:
        with connection:
            connection.execute("BEGIN")
            connection.execute(
                "CREATE TABLE features (key BLOB PRIMARY KEY, width INTEGER NOT NULL, dtype TEXT NOT NULL, "
                "digest BLOB NOT NULL, content BLOB NOT NULL)"
            )
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    elif version != FORMAT_VERSION:
        raise FeaturesInvalid(f"{path}: version {version} of a cache of features; this build knows {FORMAT_VERSION}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise FeaturesInvalid(f"{path}: cannot be used as a cache of features, remove it: {error}") from error
