"""Measures where domains' deltas lie and writes it into the report. Knows directions and rows, not models or files.

Letters: N examples, O out features, K directions, C rank rows of all kept rounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.delta_recorder import ProjectionKey
from training.null_space import protected_energy
from training.protected_space import ProtectedSpace, name_of
from training.reports import DomainName, SubspaceReport

Directions = Mapping[ProjectionKey, Tensor]  # (O, K), orthonormal columns


@dataclass(frozen=True, slots=True, eq=False)
class DomainSubspace:
    """What is known of one domain's deltas when it is frozen; all mappings have the same projections."""

    rows: Mapping[ProjectionKey, Tensor]  # (N, O): the domain's mean deltas
    directions: Directions  # its leading ones
    singular_values: Mapping[ProjectionKey, Tensor]  # (K,)
    folded_b: Mapping[ProjectionKey, Tensor]  # (C, O), as stored
    before: ProtectedSpace  # what was protected while it trained
    after: ProtectedSpace  # with its own directions


def mean_principal_cosine(one: Tensor, other: Tensor) -> float:
    """(O, K1), (O, K2) orthonormal -> the mean cosine of the min(K1, K2) principal angles; 0 if either is empty.

    The cosines are the singular values of V1ᵀ V2 (Björck and Golub 1973, theorem 1).
    """
    cosines = torch.linalg.svdvals(one.float().T @ other.float().to(one.device))
    return float(cosines.clamp(max=1.0).mean()) if cosines.numel() else 0.0


def overlap(deltas: Tensor, directions: Tensor) -> float:
    """(N, O), (O, K) -> ||D V||² / ||D||²: the share of the deltas inside the directions; 0 if they are zero."""
    return protected_energy(deltas, directions.to(deltas.device))


def empty_report() -> SubspaceReport:
    """A report of no domain."""
    return SubspaceReport(singular_values={}, cosines={}, protected_energy={}, overlap={}, protected_share={})


def add_domain(
    report: SubspaceReport, domain: DomainName, subspace: DomainSubspace, earlier: Mapping[DomainName, Directions]
) -> SubspaceReport:
    """The report with one more domain; what it said of that domain before is replaced.

    `earlier` are the leading directions of the domains trained before it. Raises ValueError that names what differs
    in its projections from the domain's rows.
    """
    if domain in earlier:
        raise ValueError(f"domain {domain!r} is among its own earlier domains")
    _require_same_projections(subspace, earlier)
    before = subspace.before.bases
    cosines = {name: _cosines(subspace.directions, theirs) for name, theirs in earlier.items()}
    values = {name_of(key): tuple(numbers.tolist()) for key, numbers in subspace.singular_values.items()}
    inside = {name_of(key): protected_energy(b, before[key].to(b.device)) for key, b in subspace.folded_b.items()}
    overlaps = {name_of(key): overlap(rows, before[key]) for key, rows in subspace.rows.items()}
    shares = {name_of(key): share for key, share in subspace.after.shares.items()}
    return SubspaceReport(
        singular_values={**report.singular_values, domain: values},
        cosines={**report.cosines, domain: cosines},
        protected_energy={**report.protected_energy, domain: inside},
        overlap={**report.overlap, domain: overlaps},
        protected_share={**report.protected_share, domain: shares},
    )


def _cosines(one: Directions, other: Directions) -> dict[str, float]:
    return {name_of(key): mean_principal_cosine(directions, other[key]) for key, directions in one.items()}


def _require_same_projections(subspace: DomainSubspace, earlier: Mapping[DomainName, Directions]) -> None:
    parts: dict[str, Mapping[ProjectionKey, Tensor]] = {
        "directions": subspace.directions,
        "singular values": subspace.singular_values,
        "folded B": subspace.folded_b,
        "space before": subspace.before.bases,
        "space after": subspace.after.bases,
        **{f"directions of {name!r}": directions for name, directions in earlier.items()},
    }
    for part, mapping in parts.items():
        differing = sorted(mapping.keys() ^ subspace.rows.keys())
        if differing:
            raise ValueError(f"{part} and the rows differ in {len(differing)} projections: {name_of(differing[0])}")
