"""What a run writes down for people and figures: frozen records, kept as JSON in the store's `reports` folder.

Losses are token-weighted means over the answers of held-out examples, in nats. Letters: E experts, K directions.
`layer.projection`, such as `0.q_proj`, names one projection.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from stack_store.atomic import replace_file
from training.errors import ReportInvalid

REPORTS_FOLDER = "reports"
MODES = ("isolated", "ungated", "routed")

Report = TypeVar("Report")
ProjectionName = str  # layer.projection
DomainName = str


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round of residual boosting."""

    round: int
    start_loss: float  # with the earlier rounds alone
    best_loss: float
    kept: bool  # false: it gained less than min_gain, or nothing, and was dropped
    stop: str  # steps | patience | spike | not finite
    steps_run: int
    seconds: float
    validation: tuple[tuple[int, float], ...]  # step, held-out loss
    training: tuple[float, ...]  # each step's mean answer loss, without the load-balance term


@dataclass(frozen=True, slots=True)
class DomainReport:
    """What training one domain did."""

    domain: str
    recipe_digest: str
    train_examples: int
    held_out_examples: int
    too_long: int  # records left out: longer than max_example_tokens
    base_loss: float  # the base alone
    context_loss: float  # with what else was active while it trained, before round 1; equals base_loss if isolated
    loss: float  # with its kept rounds, in that same context, which under `sampled` is its own rounds alone
    rounds: tuple[RoundReport, ...]
    experts: Mapping[ProjectionName, tuple[float, ...]]  # of round 1: each expert's share of the assignments, E numbers
    seconds: float  # of its rounds


@dataclass(frozen=True, slots=True)
class ForgettingReport:
    """Loss of each domain after each later one was trained."""

    base: Mapping[DomainName, float]
    after: Mapping[DomainName, Mapping[str, Mapping[DomainName, float]]]  # domain last trained -> mode -> evaluated


@dataclass(frozen=True, slots=True)
class SubspaceReport:
    """Where in each projection's output space the domains' deltas lie."""

    singular_values: Mapping[DomainName, Mapping[ProjectionName, tuple[float, ...]]]  # of a domain's deltas, K numbers
    # Between the K leading directions of two domains: mean cosine of the principal angles.
    cosines: Mapping[DomainName, Mapping[DomainName, Mapping[ProjectionName, float]]]
    # Of a frozen domain's B, the share of its squared norm inside what earlier domains had claimed: what was protected
    # while it trained, if the null space was enabled.
    protected_energy: Mapping[DomainName, Mapping[ProjectionName, float]]
    # Of a domain's mean deltas, the share of their squared norm inside the earlier domains' protected directions.
    overlap: Mapping[DomainName, Mapping[ProjectionName, float]]
    protected_share: Mapping[DomainName, Mapping[ProjectionName, float]]  # of O: what is claimed after the domain


def report_path(store: Path, name: str) -> Path:
    """Where a store keeps the report of that name."""
    return store / REPORTS_FOLDER / f"{name}.json"


def write_report(path: Path, report: Any) -> None:
    """Writes one report, a dataclass or plain JSON values, atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = asdict(report) if is_dataclass(report) and not isinstance(report, type) else report
    with replace_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_report(path: Path, kind: type[Report]) -> Report | None:
    """A report as it was written, or None if there is none. Raises ReportInvalid that names the file and the field."""
    if not path.exists():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ReportInvalid(f"{path}: {faults}") from error


def read_report_of(path: Path, kind: type[Report], domains: Collection[str]) -> Report | None:
    """A report, all of whose fields are by domain, of these domains only: without what another recipe's run left in it.

    None if there is none, or if there are no domains, so that the first of a run need not read what will be replaced.
    """
    report = read_report(path, kind) if domains else None
    if report is None:
        return None
    assert is_dataclass(report)
    assert not isinstance(report, type)
    kept = {
        field.name: {name: value for name, value in getattr(report, field.name).items() if name in domains}
        for field in fields(report)
    }
    return replace(report, **kept)
