"""Moves records that plainly belong to another domain there, by keywords (Brainstacks paper, section 3.4).

A record's score for a domain is the number of that domain's distinct patterns that are found at least once in its
prompt and answer, without regard to case. MARGIN says how plain it must be.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.records import DomainName, Pools, Record, SourcedRecord
from training.errors import RecipeInvalid
from training.recipe import DomainSection

MARGIN = 2  # the best other domain must have this many more patterns: one word alone is often chance
PLAIN = re.compile(r"(?P<start>\\b)?(?P<word>[A-Za-z0-9_ ]+)(?P<end>\\b)?")
# Characters outside ASCII that match an ASCII letter without regard to case: dotted and dotless i, long s, kelvin.
FOLDS_TO_ASCII = re.compile("[\u0130\u0131\u017f\u212a]")


@dataclass(frozen=True, slots=True)
class Keyword:
    """One pattern, and for plain words an equal search of lower-case text, which is many times faster."""

    pattern: re.Pattern[str]
    word: str = ""
    in_lowered: re.Pattern[str] | None = None

    def is_in(self, text: str, lowered: str | None) -> bool:
        """Whether the pattern is found. `lowered` is the text in lower case, None if that is not the same search."""
        if lowered is None or self.in_lowered is None:
            return self.pattern.search(text) is not None
        return self.word in lowered and self.in_lowered.search(lowered) is not None


Keywords = Mapping[DomainName, Sequence[Keyword]]


@dataclass(frozen=True, slots=True)
class Decontaminated:
    """What belongs where."""

    kept: Mapping[DomainName, list[SourcedRecord]]  # by the domain they now belong to; incomers last
    moved: Mapping[DomainName, Mapping[DomainName, list[SourcedRecord]]]  # from -> to
    dropped: Mapping[DomainName, list[SourcedRecord]]  # it was no domain's more than another's


def compile_keywords(domains: Sequence[DomainSection]) -> Keywords:
    """Each domain's distinct patterns. Raises RecipeInvalid that names domain and pattern."""
    return {
        domain.name: [_compile(domain.name, pattern) for pattern in dict.fromkeys(domain.keywords)]
        for domain in domains
    }


def keyword_scores(record: Record, keywords: Keywords) -> dict[DomainName, int]:
    """How many distinct patterns of each domain are found in a record."""
    text = f"{record.prompt}\n{record.output}"
    lowered = None if FOLDS_TO_ASCII.search(text) else text.lower()
    return {domain: sum(word.is_in(text, lowered) for word in words) for domain, words in keywords.items()}


def decontaminate(pools: Pools, keywords: Keywords) -> Decontaminated:
    """A record that another domain's score claims by MARGIN goes there; claimed by several alike, it is dropped."""
    kept: dict[DomainName, list[SourcedRecord]] = {domain: [] for domain in pools}
    moved: dict[DomainName, dict[DomainName, list[SourcedRecord]]] = {domain: {} for domain in pools}
    dropped: dict[DomainName, list[SourcedRecord]] = {domain: [] for domain in pools}
    for domain, records in pools.items():
        for item in records:
            claimants = _claimants(keyword_scores(item.record, keywords), domain)
            if not claimants:
                kept[domain].append(item)
            elif len(claimants) > 1:
                dropped[domain].append(item)
            else:
                moved[domain].setdefault(claimants[0], []).append(item)
    for targets in moved.values():
        for target, items in targets.items():
            kept[target].extend(items)
    return Decontaminated(kept, moved, dropped)


def _claimants(scores: Mapping[DomainName, int], own: DomainName) -> list[DomainName]:
    best = max((score for domain, score in scores.items() if domain != own), default=0)
    if best - scores[own] < MARGIN:
        return []
    return [domain for domain, score in scores.items() if domain != own and score == best]


def _compile(domain: DomainName, pattern: str) -> Keyword:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RecipeInvalid(f"keyword {pattern!r} of domain {domain!r} is no regular expression: {error}") from error
    plain = PLAIN.fullmatch(pattern)
    if plain is None:
        return Keyword(compiled)
    word = plain["word"].lower()
    # The word first: it is what a search can jump to.
    start, end = rf"(?<=\b{word})" if plain["start"] else "", r"\b" if plain["end"] else ""
    return Keyword(compiled, word, re.compile(f"{word}{start}{end}"))
