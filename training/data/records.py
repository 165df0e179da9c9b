"""Defines a record, where it came from, and when two texts are the same. Knows no files and no tokens."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

DomainName = str


class Prompted(Protocol):
    """Whatever asks something."""

    @property
    def prompt(self) -> str:
        """What the user says."""


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction and its answer."""

    instruction: str
    output: str
    input: str = ""
    source: str = ""

    @property
    def prompt(self) -> str:
        """What the user says: the instruction and, on its own paragraph, the input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class SourceKey:
    """A source by its place in the recipe: the domain that names it, and its index there."""

    domain: DomainName
    index: int


@dataclass(frozen=True, slots=True)
class SourcedRecord:
    """A record that remembers where it came from, whichever domain it ends in."""

    record: Record
    place: str  # file:line, or dataset/config:split[revision]:row
    source: SourceKey

    @property
    def prompt(self) -> str:
        """What the user says."""
        return self.record.prompt


Pools = Mapping[DomainName, Sequence[SourcedRecord]]  # each domain's records, domains in the recipe's order


@dataclass(frozen=True, slots=True)
class DomainRecords:
    """What one domain trains on and what it is measured on. No prompt is on both sides."""

    domain: DomainName
    train: list[Record]
    held_out: list[Record]

    @property
    def digest(self) -> str:
        """sha256 in hex of all prompts and answers, in order."""
        content = [[[record.prompt, record.output] for record in side] for side in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def normalise_text(text: str) -> str:
    """What two texts share if they differ only in case, spacing and Unicode's compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_digest(text: str) -> bytes:
    """Equal for texts that are the same when normalised, else different."""
    return hashlib.sha256(normalise_text(text).encode()).digest()


def prompt_rank(prompt: str, seed: int) -> bytes:
    """Where a prompt stands in the seeded order of all prompts there could be: a function of these two alone."""
    return hashlib.sha256(f"{seed}\0{normalise_text(prompt)}".encode()).digest()
