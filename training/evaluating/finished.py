"""Keeps every finished measurement under a digest of all that it depends on. Knows JSON values, not what they mean.

One SQLite file. A run that was killed loses at most the batch that it was in, and a changed stack, router or record is
simply another key: nothing has to be invalidated.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from training.errors import EvaluationInvalid

Work = Callable[[list[int]], Iterable[Mapping[int, Any]]]
"""Indices -> their values, batch by batch; a batch is kept as soon as it is there."""
Progress = Callable[[int, int], None]  # done, of how many

TABLE = "CREATE TABLE IF NOT EXISTS finished (key BLOB PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
MAX_VARIABLES = 500  # SQLite's own bound on `?` in a statement is higher in every version


class Finished:
    """The measurements that are done. One process at a time; a second waits for the first one's write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._naming_the_file():
            self._database = sqlite3.connect(path, timeout=60)
        try:
            with self._naming_the_file():
                self._database.execute(TABLE)
        except EvaluationInvalid:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._database.close()

    def complete(self, keys: Sequence[bytes], work: Work, on_progress: Progress = lambda *_: None) -> list[Any]:
        """The values of all keys, in order: those that are known, and for the rest what `work` makes of them.

        Equal keys are worked on once.
        """
        known = self._read(set(keys))
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in known)
        on_progress(len(first) - len(missing), len(first))
        for batch in work(missing) if missing else ():
            done = {keys[index]: value for index, value in batch.items()}
            self._write(done)
            known |= done
            on_progress(len(known), len(first))
        return [known[key] for key in keys]

    def _read(self, keys: set[bytes]) -> dict[bytes, Any]:
        wanted, found = sorted(keys), dict[bytes, Any]()
        with self._naming_the_file():
            for start in range(0, len(wanted), MAX_VARIABLES):
                part = wanted[start : start + MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                rows = self._database.execute(f"SELECT key, value FROM finished WHERE key IN ({marks})", part)  # noqa: S608 - only marks
                found |= {key: json.loads(value) for key, value in rows}
        return found

    def _write(self, values: Mapping[bytes, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._naming_the_file(), self._database:  # one transaction
            self._database.executemany("INSERT OR REPLACE INTO finished VALUES (?, ?)", rows)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise EvaluationInvalid(f"{self._path}: cannot keep finished measurements: {error}") from error


def content_key(kind: str, *content: Any) -> bytes:
    """A digest of JSON values: the same for the same content in every process."""
    return hashlib.sha256(json.dumps([kind, *content]).encode()).digest()
