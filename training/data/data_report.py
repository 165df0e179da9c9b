"""What became of every record, in numbers, by source and by domain. Knows fates, not texts."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from training.data.records import DomainName, SourcedRecord, SourceKey
from training.data.rows import BadRow
from training.recipe import DomainSection

PLACES_KEPT = 20


@dataclass(frozen=True, slots=True)
class RecordCounts:
    """Numbers of records. A source's are of its own records, wherever they ended; each has one fate:

    `read` = filtered + bad + duplicates + duplicates_elsewhere + dropped + leaked + capped + train + held_out.

    A domain's `leaked`, `capped`, `train` and `held_out` are of what ended in it, the others of its own sources, so
    there `reassigned_in` comes to the left side and `reassigned` to the right.
    """

    read: int  # rows
    filtered: int  # `where` did not keep them
    bad: int
    chat_tokens: int  # removed; not records
    duplicates: int
    duplicates_elsewhere: int  # an earlier domain has the same record
    reassigned: int  # by keywords, to another domain; a source's own go on to be counted below
    dropped: int  # keywords claimed them for several other domains alike
    leaked: int  # an earlier domain holds their prompt out
    capped: int  # more than the caps, and max_records by weights, let into training
    train: int
    held_out: int


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source's records."""

    source: str
    counts: RecordCounts
    first_bad: tuple[BadRow, ...]


@dataclass(frozen=True, slots=True)
class DomainDataReport:
    """One domain's records, and those of its sources."""

    counts: RecordCounts
    reassigned_in: int
    reassigned_to: Mapping[DomainName, int]
    sources: tuple[SourceReport, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """All domains, in the recipe's order."""

    domains: Mapping[DomainName, DomainDataReport]


class Tally:
    """Counts while data are prepared."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[SourceKey | DomainName, str]] = Counter()
        self._moved: Counter[tuple[DomainName, DomainName]] = Counter()
        self._bad: dict[SourceKey, tuple[BadRow, ...]] = {}

    def add(self, field: str, key: SourceKey, number: int) -> None:
        """Counts for a source and for the domain that names it."""
        self._counts[key, field] += number
        self._counts[key.domain, field] += number

    def add_bad(self, key: SourceKey, bad: list[BadRow]) -> None:
        """Counts bad rows and keeps the first."""
        self.add("bad", key, len(bad))
        self._bad[key] = tuple(bad[:PLACES_KEPT])

    def add_fate(self, field: str, by_domain: Mapping[DomainName, Iterable[SourcedRecord]]) -> None:
        """Counts one fate of records, for their sources and for the domains in which it met them."""
        for domain, records in by_domain.items():
            for record in records:
                self._counts[record.source, field] += 1
                self._counts[domain, field] += 1

    def add_moved(self, moved: Mapping[DomainName, Mapping[DomainName, list[SourcedRecord]]]) -> None:
        """Counts records that went from one domain to another."""
        for origin, targets in moved.items():
            for target, records in targets.items():
                self.add_fate("reassigned", {origin: records})
                self._moved[origin, target] += len(records)

    def counts(self, of: SourceKey | DomainName) -> RecordCounts:
        """The numbers so far of one source or domain."""
        return RecordCounts(**{field.name: self._counts[of, field.name] for field in fields(RecordCounts)})

    def report(self, domains: Iterable[DomainSection]) -> DataReport:
        """Everything that was counted."""
        return DataReport({domain.name: self._domain_report(domain) for domain in domains})

    def _domain_report(self, domain: DomainSection) -> DomainDataReport:
        keys = [(SourceKey(domain.name, index), source) for index, source in enumerate(domain.all_sources)]
        return DomainDataReport(
            counts=self.counts(domain.name),
            reassigned_in=sum(number for (_, target), number in self._moved.items() if target == domain.name),
            reassigned_to={target: number for (origin, target), number in self._moved.items() if origin == domain.name},
            sources=tuple(SourceReport(s.name, self.counts(key), self._bad.get(key, ())) for key, s in keys),
        )
