"""Keeps features in one sqlite file, known by what they depend on, so that a second training need not compute them.

Knows tensors and keys, no router. Values are float16, or float32 where float16 has no such number.
Legend: T tokens, H hidden size of the base.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.cache_file import CacheKind
from training.errors import FeaturesInvalid

FEATURES = CacheKind(
    content="features",
    table="CREATE TABLE features (key BLOB PRIMARY KEY, width INTEGER NOT NULL, dtype TEXT NOT NULL, "
    "digest BLOB NOT NULL, content BLOB NOT NULL)",
    version=1,
    error=FeaturesInvalid,
)
FeatureKey = bytes


class FeatureCache:
    """Features that survive a kill: what was put is durable when `put` returns."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use open_feature_cache."""
        self._connection, self._path = connection, path

    def get(self, key: FeatureKey) -> Tensor | None:
        """(T, H) float16 or float32, or None. Raises FeaturesInvalid if they are not what was put."""
        with FEATURES.naming(self._path):
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
        with FEATURES.naming(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", rows)


@contextmanager
def open_feature_cache(path: Path) -> Iterator[FeatureCache]:
    """The cache at `path`, made if it is not there. Raises FeaturesInvalid that names a damaged or foreign file."""
    with FEATURES.open(path) as connection:
        yield FeatureCache(connection, path)


def compact(features: Tensor) -> Tensor:
    """(T, H) -> the same on the CPU in float16, or in float32 if a number is too large for that."""
    half = features.half()
    return (half if half.isfinite().all() else features.float()).cpu().contiguous()


def _row(features: Tensor) -> tuple[int, str, bytes, bytes]:
    values = features.numpy()
    content = values.tobytes()
    return values.shape[1], values.dtype.name, hashlib.sha256(content).digest(), content
