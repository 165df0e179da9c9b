"""Keeps outcomes in a store, a line a prompt, and reads them back if they are of the store's stacks. Knows no model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from stack_store.atomic import replace_file
from stack_store.manifest import Manifest, read_manifest
from training.discovery.combinations import DomainName, Outcome, name_combination, parse_combination
from training.discovery.prompts import LabelledExample, prompt_sha256
from training.discovery.report import REPORT_NAME, DiscoveryReport
from training.errors import DiscoveryInvalid
from training.reports import REPORTS_FOLDER, read_report, report_path

OUTCOMES_FILE = "outcomes.jsonl"


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """What was found for one prompt of one domain."""

    label: DomainName
    prompt_sha256: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class StoredOutcomes:
    """All that one discovery found, in its order: by label, then by record."""

    domains: tuple[DomainName, ...]  # that were searched, in the recipe's order
    outcomes: tuple[StoredOutcome, ...]

    def of_prompt(self, label: DomainName, prompt: str) -> tuple[Outcome, ...]:
        """What was found for a prompt: several outcomes if it had several answers, none if it was not searched."""
        digest = prompt_sha256(prompt)
        return tuple(
            stored.outcome for stored in self.outcomes if (stored.label, stored.prompt_sha256) == (label, digest)
        )


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    prompt_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    best: str
    soft: tuple[str, ...]
    losses: Mapping[str, FiniteFloat]


def outcomes_path(store: Path) -> Path:
    """Where a store keeps its outcomes."""
    return store / REPORTS_FOLDER / OUTCOMES_FILE


def write_outcomes(
    store: Path, examples: Sequence[LabelledExample], outcomes: Sequence[Outcome], domains: Sequence[DomainName]
) -> str:
    """Writes a line a prompt, without its text, atomically; returns the file's sha256, which the report is to name."""
    lines = [
        json.dumps(
            {
                "label": example.label,
                "prompt_sha256": example.prompt_sha256,
                "best": name_combination(outcome.best, domains),
                "soft": [name for name in domains if name in outcome.soft],
                "losses": {name_combination(tried, domains): loss for tried, loss in outcome.losses.items()},
            }
        )
        for example, outcome in zip(examples, outcomes, strict=True)
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    path = outcomes_path(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def read_outcomes(store: Path) -> StoredOutcomes | None:
    """The store's outcomes; None if nothing was discovered.

    Raises DiscoveryInvalid if they are damaged, or of other stacks than the store has now. A domain that the store got
    since then is not in them.
    """
    path, report = outcomes_path(store), read_report(report_path(store, REPORT_NAME), DiscoveryReport)
    if report is None and not path.exists():
        return None
    if report is None or not path.exists() or _sha256(path) != report.outcomes_sha256:
        raise DiscoveryInvalid(
            f"{path} does not belong to {report_path(store, REPORT_NAME)}: run brainstacks-train discover again"
        )
    _require_same_stacks(path, report, read_manifest(store / "manifest.json"))
    domains = tuple(report.stack_digests)
    lines = path.read_text(encoding="utf-8").splitlines()
    outcomes = tuple(_outcome(f"{path}:{number}", line, domains) for number, line in enumerate(lines, 1))
    return StoredOutcomes(domains, outcomes)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _require_same_stacks(path: Path, report: DiscoveryReport, manifest: Manifest) -> None:
    now = {entry.name: tuple(stack.digest for stack in entry.stacks) for entry in manifest.domains}
    changed = [name for name, digests in report.stack_digests.items() if now.get(name) != digests]
    if changed:
        raise DiscoveryInvalid(
            f"{path} was discovered with other stacks of the domains {changed} than the store has: "
            "run brainstacks-train discover again"
        )


def _outcome(place: str, line: str, domains: tuple[DomainName, ...]) -> StoredOutcome:
    try:
        read = _Line.model_validate_json(line)
        outcome = Outcome(
            best=parse_combination(read.best, domains),
            soft=frozenset(read.soft),
            losses={parse_combination(name, domains): loss for name, loss in read.losses.items()},
        )
    except (ValidationError, ValueError) as error:
        raise DiscoveryInvalid(f"{place}: {error}") from error
    return StoredOutcome(read.label, read.prompt_sha256, outcome)
