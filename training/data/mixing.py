"""Chooses how many and which records of each source a domain trains on: caps, weights, limits. Knows no texts' meaning.

The choice is by a seeded order of the records themselves, so it is the same whatever order the files are in.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from training.data.records import DomainName, Pools, SourcedRecord, SourceKey
from training.recipe import DomainSection

Ranked = tuple[bytes, DomainName, int]  # a record: its seeded rank, the domain it is in, its index there


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a run trains on, in its former order, and what was more than caps and limits allow."""

    kept: dict[DomainName, list[SourcedRecord]]
    left_out: dict[DomainName, list[SourcedRecord]]


def mix_sources(pools: Pools, domains: Sequence[DomainSection], *, seed: int) -> Mixed:
    """Each source gives at most its `cap`, over all domains; in each domain the sources share its `max_records`.

    A record that was moved into another domain has its own source's weight there.
    """
    sections = {SourceKey(d.name, index): source for d in domains for index, source in enumerate(d.all_sources)}
    ranked = _rank(pools, seed)
    offers = {key: ranked.get(key, [])[: section.cap] for key, section in sections.items()}
    mixed = Mixed({}, {})
    for domain in domains:
        here = {key: [index for _, name, index in offer if name == domain.name] for key, offer in offers.items()}
        available = [len(indices) for indices in here.values()]
        total = sum(available) if domain.max_records is None else domain.max_records
        quotas = share_out(total, [section.weight for section in sections.values()], available)
        chosen = {i for indices, quota in zip(here.values(), quotas, strict=True) for i in indices[:quota]}
        mixed.kept[domain.name] = [item for i, item in enumerate(pools[domain.name]) if i in chosen]
        mixed.left_out[domain.name] = [item for i, item in enumerate(pools[domain.name]) if i not in chosen]
    return mixed


def share_out(total: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """How many each gives: in proportion to its weight, what it cannot give goes to the others in proportion.

    Gives min(total, sum of available) in all. Exact: largest remainders round, the earlier of equals first.
    """
    exact = [Fraction(weight) for weight in weights]
    given = list(available)
    open_ = list(range(len(weights)))  # those that have more than their share
    while open_:
        left = total - sum(given[i] for i in range(len(weights)) if i not in open_)
        per_weight = Fraction(left) / sum(exact[i] for i in open_)
        dry = [i for i in open_ if available[i] <= exact[i] * per_weight]
        if not dry:
            return _round({i: exact[i] * per_weight for i in open_}, given)
        open_ = [i for i in open_ if i not in dry]
    return given


def _round(shares: Mapping[int, Fraction], given: list[int]) -> list[int]:
    """Whole numbers with the shares' own sum, which is whole."""
    rounded = {i: floor(share) for i, share in shares.items()}
    missing = int(sum(shares.values())) - sum(rounded.values())
    for i in sorted(shares, key=lambda i: (rounded[i] - shares[i], i))[:missing]:
        rounded[i] += 1
    return [rounded.get(i, number) for i, number in enumerate(given)]


def _rank(pools: Pools, seed: int) -> dict[SourceKey, list[Ranked]]:
    ranked: dict[SourceKey, list[Ranked]] = {}
    for domain, items in pools.items():
        for index, item in enumerate(items):
            ranked.setdefault(item.source, []).append((_choice_rank(item, seed), domain, index))
    return {key: sorted(places) for key, places in ranked.items()}


def _choice_rank(item: SourcedRecord, seed: int) -> bytes:
    # Not the rank of the split: the first records of the training order would then come from the most cut source.
    return hashlib.sha256(f"{seed}\0choice\0{item.prompt}\0{item.record.output}".encode()).digest()
