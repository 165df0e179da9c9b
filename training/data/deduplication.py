"""Keeps the first of records that are the same. Knows texts and the order of domains, not tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from training.data.records import DomainName, Pools, SourcedRecord, text_digest


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """What stayed and what went, by domain."""

    kept: Mapping[DomainName, list[SourcedRecord]]
    repeated: Mapping[DomainName, list[SourcedRecord]]  # the domain itself has it already
    elsewhere: Mapping[DomainName, list[SourcedRecord]]  # an earlier domain has it


def deduplicate(pools: Pools) -> Deduplicated:
    """Of records with the same prompt and answer, but for case and spacing, the first of the earliest domain stays."""
    owner: dict[tuple[bytes, bytes], DomainName] = {}
    kept: dict[DomainName, list[SourcedRecord]] = {domain: [] for domain in pools}
    repeated: dict[DomainName, list[SourcedRecord]] = {domain: [] for domain in pools}
    elsewhere: dict[DomainName, list[SourcedRecord]] = {domain: [] for domain in pools}
    for domain, records in pools.items():
        for item in records:
            key = (text_digest(item.prompt), text_digest(item.record.output))
            side = kept if key not in owner else repeated if owner[key] == domain else elsewhere
            side[domain].append(item)
            owner.setdefault(key, domain)
    return Deduplicated(kept, repeated, elsewhere)
