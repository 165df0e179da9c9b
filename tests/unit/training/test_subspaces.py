"""The numbers of the subspace report, against float64 and by hand, and how the report grows."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model.delta_recorder import ProjectionKey
from stack_store.format import PROJECTIONS, Geometry
from training.null_space import fold, leading_directions
from training.protected_space import ProtectedSpace, extend
from training.reports import SubspaceReport, read_report, report_path, write_report
from training.subspaces import DomainSubspace, add_domain, empty_report, mean_principal_cosine, overlap

GEOMETRY = Geometry(2, dict.fromkeys(PROJECTIONS, (12, 12)))
KEYS = list(ProtectedSpace.empty(GEOMETRY).bases)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed).double()).Q.float()


def subspace(before: ProtectedSpace, *, seed: int) -> DomainSubspace:
    rows = {key: normal(9, 12, seed=seed + i) for i, key in enumerate(KEYS)}
    found = {key: leading_directions(deltas, 2, seed=0) for key, deltas in rows.items()}
    directions = {key: leading for key, (leading, _) in found.items()}
    return DomainSubspace(
        rows=rows,
        directions=directions,
        singular_values={key: values for key, (_, values) in found.items()},
        folded_b={key: fold(normal(4, 12, seed=seed - i), before.bases[key]) for i, key in enumerate(KEYS)},
        before=before,
        after=extend(before, directions, max_share=0.5),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 40), first=st.integers(0, 12), second=st.integers(0, 12), seed=st.integers(0, 2**31 - 2))
def test_mean_cosine_equals_the_mean_over_principal_angles(width: int, first: int, second: int, seed: int) -> None:
    one, other = (orthonormal(width, min(n, width), seed=seed + i) for i, n in enumerate((first, second)))
    # Slow: the best pair of unit vectors, one of each subspace, then the best pair outside those, and so on.
    product, cosines = one.double().T @ other.double(), []
    for _ in range(min(product.shape)):
        left, values, right = torch.linalg.svd(product)
        cosines.append(float(values[0]))
        product = product - values[0] * torch.outer(left[:, 0], right[0])
    expected = sum(cosines) / len(cosines) if cosines else 0.0
    assert mean_principal_cosine(one, other) == pytest.approx(expected, abs=1e-5)
    assert mean_principal_cosine(other, one) == pytest.approx(expected, abs=1e-5)


def test_mean_cosine_by_hand() -> None:
    axes = torch.eye(4)
    tilted = torch.stack([math.cos(0.3) * axes[0] + math.sin(0.3) * axes[3], axes[1]], dim=1)
    assert mean_principal_cosine(axes[:, :2], tilted) == pytest.approx((math.cos(0.3) + 1) / 2)
    assert mean_principal_cosine(axes[:, :2], axes[:, 2:]) == 0.0
    assert mean_principal_cosine(axes[:, :3], axes[:, [2, 0]]) == 1.0
    assert mean_principal_cosine(axes[:, :0], axes) == 0.0


def test_overlap_is_the_share_of_the_squared_norm() -> None:
    axes = torch.eye(3)
    assert overlap(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), axes[:, :1]) == pytest.approx(9 / 25)
    assert overlap(torch.zeros(2, 3), axes) == 0.0
    assert overlap(torch.ones(2, 3), axes[:, :0]) == 0.0


def test_report_grows_domain_by_domain_and_survives_its_file(tmp_path: Path) -> None:
    first = subspace(ProtectedSpace.empty(GEOMETRY), seed=100)
    second = subspace(first.after, seed=200)
    one = add_domain(empty_report(), "chat", first, {})
    both = add_domain(one, "code", second, {"chat": first.directions})
    assert one.singular_values.keys() == {"chat"}  # the report before is as it was
    assert both.singular_values["chat"] == one.singular_values["chat"]
    assert both.cosines["chat"] == {}
    assert both.overlap["chat"]["0.q_proj"] == both.protected_energy["chat"]["0.q_proj"] == 0.0
    for key in KEYS:
        name = f"{key[0]}.{key[1]}"
        rows, protected = second.rows[key].double(), first.after.bases[key].double()
        assert both.overlap["code"][name] == pytest.approx(float(((rows @ protected) ** 2).sum() / (rows**2).sum()))
        assert both.cosines["code"]["chat"][name] == mean_principal_cosine(
            second.directions[key], first.directions[key]
        )
        exact = torch.linalg.svdvals(second.rows[key])[:2].tolist()
        assert both.singular_values["code"][name] == pytest.approx(exact, rel=1e-5)
        assert both.protected_energy["code"][name] < 1e-10
        assert both.protected_share["chat"][name] == 2 / 12
        assert both.protected_share["code"][name] == 4 / 12
    write_report(report_path(tmp_path, "subspaces"), both)
    assert read_report(report_path(tmp_path, "subspaces"), SubspaceReport) == both


def test_a_domain_measured_again_replaces_what_was_said_of_it() -> None:
    space = ProtectedSpace.empty(GEOMETRY)
    twice = add_domain(
        add_domain(empty_report(), "chat", subspace(space, seed=1), {}), "chat", subspace(space, seed=50), {}
    )
    assert twice == add_domain(empty_report(), "chat", subspace(space, seed=50), {})


def test_mappings_that_do_not_belong_together_are_refused_by_name() -> None:
    whole = subspace(ProtectedSpace.empty(GEOMETRY), seed=1)
    partial: dict[ProjectionKey, Tensor] = {key: v for key, v in whole.directions.items() if key != (1, "o_proj")}
    with pytest.raises(ValueError, match=r"directions of 'chat' and the rows differ in 1 projections: 1\.o_proj"):
        add_domain(empty_report(), "code", whole, {"chat": partial})
    with pytest.raises(ValueError, match="domain 'code' is among its own earlier domains"):
        add_domain(empty_report(), "code", whole, {"code": whole.directions})
