"""Splits records by prompt into training and held-out. Knows prompts and the seed, not sources or tokens."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from training.data.records import DomainName, Pools, Prompted, SourcedRecord, normalise_text, prompt_rank

Asked = TypeVar("Asked", bound=Prompted)


@dataclass(frozen=True, slots=True)
class Split:
    """Every domain's records. No prompt that a domain holds out is in any domain's training."""

    train: Mapping[DomainName, list[SourcedRecord]]
    held_out: Mapping[DomainName, list[SourcedRecord]]
    leaked: Mapping[DomainName, list[SourcedRecord]]  # removed: an earlier domain holds their prompt out


def split_pools(pools: Pools, *, held_out: Mapping[DomainName, int], seed: int) -> Split:
    """Splits the domains in their order, so that a domain's split depends on those before it and on none after it.

    A prompt that an earlier domain holds out is removed; one that an earlier domain trains on is not held out.
    """
    split = Split({}, {}, {})
    trained: set[str] = set()
    secret: set[str] = set()
    for domain, records in pools.items():
        clean, leaked = _partition(records, secret)
        train, held = split_records(clean, held_out=held_out[domain], seed=seed, trained=trained)
        trained |= {normalise_text(record.prompt) for record in train}
        secret |= {normalise_text(record.prompt) for record in held}
        split = Split(
            {**split.train, domain: train}, {**split.held_out, domain: held}, {**split.leaked, domain: leaked}
        )
    return split


def split_records(
    records: Sequence[Asked], *, held_out: int, seed: int, trained: Collection[str] = frozenset()
) -> tuple[list[Asked], list[Asked]]:
    """Training and held-out records, each in the seeded order of their prompts; one prompt is on one side only.

    Prompts are held out whole, in that order, until there are `held_out` records; those in `trained` never.
    A prompt's place in the order depends on itself and the seed alone, so records that come or go move no prompt across
    but those next to the border.
    """
    by_rank: dict[bytes, list[Asked]] = {}
    for record in records:
        by_rank.setdefault(prompt_rank(record.prompt, seed), []).append(record)
    train: list[Asked] = []
    held: list[Asked] = []
    for rank in sorted(by_rank):
        same_prompt = by_rank[rank]
        free = len(held) < held_out and normalise_text(same_prompt[0].prompt) not in trained
        (held if free else train).extend(same_prompt)
    return train, held


def _partition(records: Iterable[SourcedRecord], secret: set[str]) -> tuple[list[SourcedRecord], list[SourcedRecord]]:
    clean: list[SourcedRecord] = []
    leaked: list[SourcedRecord] = []
    for record in records:
        (leaked if normalise_text(record.prompt) in secret else clean).append(record)
    return clean, leaked
