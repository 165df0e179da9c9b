"""Keeps measured losses in one sqlite file, known by their content. Knows digests and numbers, no tensors.

A key is a sha256 over all that a loss depends on: the base, the digests of the stacks in the combination, the tokens.
So a changed stack loses the losses of the combinations that contain it, and no others.
"""

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from training.cache_file import CacheKind
from training.data.examples import Example
from training.discovery.combinations import Combination
from training.discovery.row_loss import RowLoss
from training.errors import DiscoveryInvalid

LOSSES = CacheKind(
    content="losses",
    table="CREATE TABLE losses (key BLOB PRIMARY KEY, loss_sum REAL NOT NULL, tokens INTEGER NOT NULL) WITHOUT ROWID",
    version=1,
    error=DiscoveryInvalid,
)
MOST_KEYS = 500  # in one question; sqlite allows 999 parameters everywhere
LossKey = bytes


class LossKeys:
    """Names a loss by its content, for one base and these stacks."""

    def __init__(self, base_identity: Sequence[str], stack_digests: Mapping[str, Sequence[str]]) -> None:
        """`base_identity`: all that tells one base, in one number format, from another. `stack_digests`: each domain's
        rounds in order."""
        self._base_identity, self._stack_digests = list(base_identity), stack_digests

    def key(self, example: Example, combination: Combination) -> LossKey:
        """The same for the same base, stacks, tokens and prompt length, whatever the domains are called."""
        stacks = sorted(list(self._stack_digests[name]) for name in combination)
        content = [self._base_identity, stacks, example.token_ids, example.prompt_length]
        return hashlib.sha256(json.dumps(content).encode()).digest()


class LossCache:
    """Losses that survive a kill: what was put is durable when `put` returns."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use open_loss_cache."""
        self._connection, self._path = connection, path

    def get(self, keys: Collection[LossKey]) -> dict[LossKey, RowLoss]:
        """The losses that are there."""
        found: dict[LossKey, RowLoss] = {}
        wanted = list(keys)
        with LOSSES.naming(self._path):
            for start in range(0, len(wanted), MOST_KEYS):
                part = wanted[start : start + MOST_KEYS]
                places = ",".join("?" * len(part))
                rows = self._connection.execute(
                    f"SELECT key, loss_sum, tokens FROM losses WHERE key IN ({places})",  # noqa: S608 - only marks
                    part,
                )
                found |= {key: RowLoss(loss_sum, tokens) for key, loss_sum, tokens in rows}
        return found

    def put(self, losses: Mapping[LossKey, RowLoss]) -> None:
        """Adds these in one transaction: after a kill all of them are there or none."""
        rows = [(key, loss.loss_sum, loss.tokens) for key, loss in losses.items()]
        with LOSSES.naming(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?, ?)", rows)


@contextmanager
def open_loss_cache(path: Path) -> Iterator[LossCache]:
    """The cache at `path`, made if it is not there. Raises DiscoveryInvalid that names a damaged or foreign file."""
    with LOSSES.open(path) as connection:
        with LOSSES.naming(path):
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise DiscoveryInvalid(f"{path}: the cache of losses is damaged: {state}; remove it to measure anew")
        yield LossCache(connection, path)
