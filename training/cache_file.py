"""Opens a sqlite file that holds one table of a known version. Knows neither its keys nor its values."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What a file keeps, its table, and the error that names a file that cannot be used."""

    content: str  # as an error calls it
    table: str  # the statement that creates it
    version: int
    error: type[Exception]

    @contextmanager
    def open(self, path: Path) -> Iterator[sqlite3.Connection]:
        """The file at `path`, made if it is not there. Raises the kind's error if it is damaged or of another kind."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.naming(path):
            connection = sqlite3.connect(path)
        with closing(connection):
            with self.naming(path):
                self._settle(connection, path)
            yield connection

    @contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """What sqlite raises in the block becomes the kind's error, with the file's name."""
        try:
            yield
        except sqlite3.Error as error:
            raise self.error(f"{path}: cannot be used as a cache of {self.content}, remove it: {error}") from error

    def _settle(self, connection: sqlite3.Connection, path: Path) -> None:
        """Makes the table in a new file, and checks an old one."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not tables and not version:
            with connection:
                connection.execute("BEGIN")
                connection.execute(self.table)
                connection.execute(f"PRAGMA user_version = {self.version}")
        elif version != self.version:
            raise self.error(f"{path}: version {version} of a cache of {self.content}; this build knows {self.version}")
