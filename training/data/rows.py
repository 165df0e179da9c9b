"""Reads the rows of JSONL files and of datasets, each with its place. Knows columns, not what they mean."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import DataUnusable
from training.recipe import SourceSection

# What the datasets library and what lies under it raise over a name, a network or a file that is not as it should be.
READING_FAULTS = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found."""

    place: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that gives no record, and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Table:
    """A source's rows and every column that at least one of them has; no columns if no row could be read."""

    columns: Sequence[str]
    rows: Iterable[Row | BadRow]


def read_file(path: Path, name: str) -> Table:
    """Every line of a JSONL file that is not blank; `name` is the file's in places. Raises DataUnusable."""
    try:
        with path.open("rb") as lines:
            rows = [_parse(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    except OSError as error:
        raise DataUnusable(f"{path}: {error}") from error
    columns = dict.fromkeys(column for row in rows if isinstance(row, Row) for column in row.columns)
    return Table(list(columns), rows)


def open_dataset(section: SourceSection, folder: Path, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Table:
    """A dataset of the hub or its cache, or a local one: a folder beside the recipe goes before the hub.

    Only the columns that `wanted` chooses are read. Raises DataUnusable that names dataset, config and split.
    """
    try:
        from datasets import load_dataset  # only a run that names a dataset needs the library
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataUnusable(
            f"source {section.name!r} is a dataset: pip install -c constraints.txt -e '.[train]'"
        ) from error
    local = folder / str(section.dataset)
    path = str(local) if local.is_dir() else section.dataset
    try:
        dataset = load_dataset(path, section.config, split=section.split, revision=section.revision)
        columns = list(dataset.column_names)
        table = dataset.select_columns(list(wanted(columns)))
    except (DatasetsError, *READING_FAULTS) as error:
        raise _unusable(section, error) from error
    return Table(columns, _dataset_rows(table, section))


def _dataset_rows(dataset: Any, section: SourceSection) -> Iterator[Row]:
    place = f"{section.name}[{section.revision}]" if section.revision else section.name
    try:
        for number, columns in enumerate(dataset):
            yield Row(f"{place}:{number}", columns)
    except READING_FAULTS as error:
        raise _unusable(section, error) from error


def _unusable(section: SourceSection, error: Exception) -> DataUnusable:
    return DataUnusable(
        f"dataset {section.dataset!r}, config {section.config!r}, split {section.split!r}, "
        f"revision {section.revision!r}: {type(error).__name__}: {error}"
    )


def _parse(line: bytes, place: str) -> Row | BadRow:
    try:
        columns = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not JSON: {error}")
    if not isinstance(columns, dict):
        return BadRow(place, f"expected an object, got {type(columns).__name__}")
    return Row(place, columns)
