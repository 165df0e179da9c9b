"""The protected space grows by what is new, up to its cap, forgets nothing, and comes back from its file as it was."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model.delta_recorder import ProjectionKey
from stack_store.format import PROJECTIONS, Geometry
from training.errors import ProtectedSpaceInvalid
from training.protected_space import ProtectedSpace, extend, name_of

GEOMETRY = Geometry(2, {name: (12, 20 if name in ("gate_proj", "up_proj") else 12) for name in PROJECTIONS})
Q: ProjectionKey = (0, "q_proj")


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise.double()).Q.float()


def directions(count: int, *, seed: int) -> dict[ProjectionKey, Tensor]:
    return {
        (layer, name): orthonormal(GEOMETRY.shapes[name][1], count, seed=seed + layer)
        for layer in (0, 1)
        for name in PROJECTIONS
    }


def space_of(basis: Tensor) -> ProtectedSpace:
    return ProtectedSpace({Q: basis})


def is_orthonormal(basis: Tensor) -> bool:
    return bool(((basis.T @ basis - torch.eye(basis.shape[1])).abs() < 1e-5).all())


def test_empty_space_has_every_projection_and_claims_nothing() -> None:
    space = ProtectedSpace.empty(GEOMETRY)
    assert len(space.bases) == 14
    assert space.bases[1, "up_proj"].shape == (20, 0)
    assert set(space.shares.values()) == {0.0}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(2, 60),
    old_count=st.integers(0, 20),
    new_count=st.integers(0, 20),
    percent=st.integers(1, 99),
    seed=st.integers(0, 2**31 - 2),
)
def test_union_is_orthonormal_keeps_the_old_and_ends_at_the_cap(
    width: int, old_count: int, new_count: int, percent: int, seed: int
) -> None:
    old, new = (orthonormal(width, min(n, width), seed=seed + i) for i, n in enumerate((old_count, new_count)))
    basis = extend(space_of(old), {Q: new}, max_share=percent / 100).bases[Q]
    cap = math.floor(Fraction(percent, 100) * width)
    room = max(0, min(cap - old.shape[1], width - old.shape[1]))
    assert basis.shape == (width, old.shape[1] + min(room, new.shape[1]))
    assert torch.equal(basis[:, : old.shape[1]], old)
    assert is_orthonormal(basis)
    # The most important first: those taken span as much as the old and the first of the new together.
    first = new[:, : basis.shape[1] - old.shape[1]]
    torch.testing.assert_close(basis @ (basis.T @ first), first, rtol=1e-3, atol=1e-4)


def test_cap_is_a_share_as_people_write_it() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert extend(space_of(torch.zeros(100, 0)), {Q: torch.eye(100)}, max_share=0.29).shares == {Q: 0.29}
    assert extend(space_of(torch.zeros(101, 0)), {Q: torch.eye(101)}, max_share=0.29).bases[Q].shape == (101, 29)


def test_directions_that_are_there_already_take_no_room() -> None:
    old = orthonormal(12, 3, seed=1)
    fresh = orthonormal(12, 4, seed=2)[:, :1]
    mixed = torch.cat([old @ orthonormal(3, 2, seed=3), fresh, fresh], dim=1)  # two old, one new, once more
    basis = extend(space_of(old), {Q: mixed}, max_share=0.9).bases[Q]
    assert basis.shape == (12, 4)
    assert is_orthonormal(basis)
    torch.testing.assert_close(basis @ (basis.T @ fresh), fresh)


def test_a_space_beyond_the_cap_keeps_its_directions_and_gets_no_more() -> None:
    old = orthonormal(12, 6, seed=1)
    assert torch.equal(extend(space_of(old), {Q: orthonormal(12, 4, seed=2)}, max_share=0.25).bases[Q], old)


def test_directions_nearly_inside_the_space_leave_it_orthonormal() -> None:
    """Barely more than what counts as vanished, so that rounding is enlarged a hundredfold and more."""
    old, other = torch.split(orthonormal(60, 20, seed=1), 10, dim=1)
    nearly = torch.nn.functional.normalize(old + 3e-3 * other, dim=0)
    basis = extend(space_of(old), {Q: nearly}, max_share=0.9).bases[Q]
    assert basis.shape == (60, 20)
    assert is_orthonormal(basis)


def test_spaces_grow_domain_by_domain() -> None:
    space = ProtectedSpace.empty(GEOMETRY)
    for seed, count in ((1, 2), (10, 4), (20, 5)):
        space = extend(space, directions(2, seed=seed), max_share=0.35)
        assert space.bases[Q].shape == (12, min(count, 4))
        assert space.bases[1, "gate_proj"].shape == (20, {2: 2, 4: 4, 5: 6}[count])
    assert all(is_orthonormal(basis) for basis in space.bases.values())


def test_what_does_not_fit_the_space_is_refused_by_name() -> None:
    space, new = ProtectedSpace.empty(GEOMETRY), directions(1, seed=1)
    with pytest.raises(ValueError, match=r"1\.up_proj: new directions have shape \[12, 1\], must be \(20, K\)"):
        extend(space, {**new, (1, "up_proj"): torch.zeros(12, 1)}, max_share=0.5)
    with pytest.raises(ValueError, match=r"0\.q_proj: new directions hold a value that is not finite"):
        extend(space, {**new, Q: torch.full((12, 1), torch.nan)}, max_share=0.5)
    with pytest.raises(ValueError, match=r"2\.q_proj is in the directions only"):
        extend(space, {**new, (2, "q_proj"): torch.zeros(12, 1)}, max_share=0.5)
    del new[0, "k_proj"]
    with pytest.raises(ValueError, match=r"0\.k_proj is in the space only"):
        extend(space, new, max_share=0.5)


def test_a_saved_space_comes_back_and_its_digest_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "protected.safetensors"
    for space in (ProtectedSpace.empty(GEOMETRY), ProtectedSpace(directions(3, seed=5))):
        digest = space.save(path)
        assert digest == space.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        loaded = ProtectedSpace.load(path, GEOMETRY)
        assert list(loaded.bases) == list(space.bases)
        assert all(torch.equal(loaded.bases[key], basis) for key, basis in space.bases.items())
        assert loaded.digest == digest
    assert ProtectedSpace(directions(3, seed=6)).digest != digest
    assert [file.name for file in tmp_path.iterdir()] == ["protected.safetensors"]


@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        ("0.q_proj", None, "lacks tensor '0.q_proj'"),
        ("2.q_proj", torch.zeros(12, 0), "has the unknown tensor '2.q_proj'"),
        ("0.q_proj", torch.zeros(11, 0), r"tensor '0.q_proj' is torch.float32 \[11, 0\], must be float32 \(12, "),
        ("0.q_proj", torch.zeros(12, 0, dtype=torch.float16), "tensor '0.q_proj' is torch.float16"),
        ("0.q_proj", torch.zeros(12), r"tensor '0.q_proj' is torch.float32 \[12\]"),
        ("0.q_proj", torch.eye(12, 13), r"tensor '0.q_proj' is torch.float32 \[12, 13\]"),
        ("0.q_proj", torch.full((12, 1), torch.nan), "tensor '0.q_proj' holds a value that is not finite"),
        ("0.q_proj", torch.ones(12, 1), "tensor '0.q_proj' is not orthonormal: off by 11"),
        ("0.q_proj", torch.eye(12)[:, [0, 0]], "tensor '0.q_proj' is not orthonormal: off by 1"),
    ],
)
def test_a_file_with_a_fault_is_refused_by_name(tmp_path: Path, name: str, tensor: Tensor | None, fault: str) -> None:
    tensors = {name_of(key): basis.contiguous() for key, basis in directions(2, seed=1).items()}
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor.contiguous()
    path = tmp_path / "protected.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ProtectedSpaceInvalid, match=f"protected.safetensors: {fault}"):
        ProtectedSpace.load(path, GEOMETRY)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "protected.safetensors"
    ProtectedSpace(directions(2, seed=1)).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProtectedSpaceInvalid, match=r"protected\.safetensors: is truncated"):
        ProtectedSpace.load(path, GEOMETRY)
