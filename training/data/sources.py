"""Reads a source of a recipe into records. What cannot be used is named by its place and counted, never skipped."""

from dataclasses import dataclass
from pathlib import Path

from training.data.records import Record
from training.data.rows import BadRow, Table, open_dataset, read_file
from training.data.templates import SourceTemplates
from training.errors import BadRecord, DataUnusable
from training.recipe import SourceSection

PLACES_IN_MESSAGE = 3


@dataclass(frozen=True, slots=True)
class SourceRecords:
    """What a source gave: `num_rows` = records + bad + filtered."""

    records: list[tuple[str, Record]]  # place, record
    bad: list[BadRow]
    filtered: int  # rows that `where` did not keep
    num_rows: int


def read_source(section: SourceSection, templates: SourceTemplates, folder: Path) -> SourceRecords:
    """Every record of a source; relative paths are seen from `folder`. Raises DataUnusable."""
    table = _open(section, templates, folder)
    if table.columns:
        templates.require_columns(table.columns)
    records: list[tuple[str, Record]] = []
    bad: list[BadRow] = []
    num_rows = 0
    for row in table.rows:
        num_rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            if templates.keeps(row.columns):
                records.append((row.place, templates.record(row.columns)))
        except BadRecord as error:
            bad.append(BadRow(row.place, str(error)))
    return SourceRecords(records, bad, num_rows - len(records) - len(bad), num_rows)


def require_usable(source: SourceRecords, label: str, *, max_bad_share: float) -> None:
    """Raises DataUnusable if a source gives no record, or a larger share of bad ones than the recipe allows."""
    num_asked = len(source.records) + len(source.bad)
    share = len(source.bad) / num_asked if num_asked else 0.0
    if share > max_bad_share:
        first = "; ".join(f"{row.place}: {row.reason}" for row in source.bad[:PLACES_IN_MESSAGE])
        raise DataUnusable(
            f"{label}: {len(source.bad)} of {num_asked} records are bad, a share of "
            f"{share:.4f}, more than data.max_bad_share {max_bad_share}; the first: {first}"
        )
    if not source.records:
        raise DataUnusable(
            f"{label} gives no record: {source.num_rows} rows, {source.filtered} not kept by `where`, "
            f"{len(source.bad)} bad"
        )


def _open(section: SourceSection, templates: SourceTemplates, folder: Path) -> Table:
    if section.file is not None:
        return read_file(folder / section.file, section.file)
    return open_dataset(section, folder, templates.wanted_columns)
