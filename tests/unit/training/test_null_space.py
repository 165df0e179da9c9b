"""Leading directions against exact float64 SVD, and what projecting and folding leave inside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.null_space import fold, leading_directions, project, protected_energy


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed).double()).Q.float()


def with_spectrum(values: Tensor, num_rows: int, width: int, *, seed: int) -> Tensor:
    left, right = (orthonormal(n, len(values), seed=seed + i) for i, n in enumerate((num_rows, width)))
    return left * values @ right.T


def largest_sine(one: Tensor, other: Tensor) -> float:
    """Of the principal angles between two subspaces of one dimension, in float64."""
    one, other = one.double(), other.double()
    return float(torch.linalg.matrix_norm(one - other @ (other.T @ one), 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_rows=st.integers(1, 90), width=st.integers(1, 90), count=st.integers(1, 20), seed=st.integers(0, 2**31 - 1))
def test_directions_are_those_of_the_exact_svd(num_rows: int, width: int, count: int, seed: int) -> None:
    """Both ways: 20 directions are found exactly here, one by a sketch as soon as both sides exceed 18."""
    rank = min(num_rows, width)
    deltas = with_spectrum(0.7 ** torch.arange(rank) * 3.0, num_rows, width, seed=seed)
    directions, values = leading_directions(deltas, count, seed=seed)
    _, exact_values, exact_right = torch.linalg.svd(deltas.double(), full_matrices=False)
    found = len(values)
    assert directions.shape == (width, found)
    assert found == min(count, int((exact_values > 1e-6 * exact_values[0]).sum()))
    assert (values[1:] <= values[:-1]).all()
    torch.testing.assert_close(values.double(), exact_values[:found], rtol=1e-4, atol=1e-5)
    assert (directions.T @ directions - torch.eye(found)).abs().max() < 1e-5
    assert largest_sine(directions, exact_right[:found].T) < 5e-3
    assert largest_sine(directions[:, :1], exact_right[:1].T) < 1e-5  # in order, the first first


@pytest.mark.parametrize(("num_rows", "width"), [(400, 192), (200, 576)])
def test_a_sketch_of_a_flat_noisy_spectrum_keeps_nearly_all_energy(num_rows: int, width: int) -> None:
    deltas = normal(num_rows, width, seed=1) + with_spectrum(torch.full((20,), 40.0), num_rows, width, seed=2)
    directions, values = leading_directions(deltas, 48, seed=3)
    exact = torch.linalg.svdvals(deltas.double())[:48]
    assert len(values) == 48
    assert float((deltas @ directions).square().sum()) > 0.98 * float(exact.square().sum())
    torch.testing.assert_close(values[:20].double(), exact[:20], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(values.double(), exact, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("shape", [(60, 70), (20, 30)])
def test_rank_deficient_deltas_give_their_rank(shape: tuple[int, int]) -> None:
    deltas = normal(shape[0], 3, seed=1) @ normal(3, shape[1], seed=2)
    directions, values = leading_directions(deltas, 10, seed=0)
    assert directions.shape == (shape[1], 3)
    assert len(values) == 3
    torch.testing.assert_close(deltas @ directions @ directions.T, deltas, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 70), (3, 5)])
def test_zero_deltas_have_no_direction(shape: tuple[int, int]) -> None:
    directions, values = leading_directions(torch.zeros(shape), 4, seed=0)
    assert directions.shape == (shape[1], 0)
    assert values.shape == (0,)


def test_the_mean_is_a_direction_too() -> None:
    deltas = torch.tensor([[0.0, 2.0, 0.0]]).repeat(5, 1)
    directions, values = leading_directions(deltas, 2, seed=0)
    torch.testing.assert_close(directions.abs(), torch.tensor([[0.0], [1.0], [0.0]]))
    torch.testing.assert_close(values, torch.tensor([20.0**0.5]))


def test_the_seed_alone_decides_and_the_global_generator_is_untouched() -> None:
    deltas = normal(80, 90, seed=1).to(torch.bfloat16)
    state = torch.get_rng_state()
    first = leading_directions(deltas, 5, seed=4)
    torch.manual_seed(99)
    second, other = leading_directions(deltas, 5, seed=4), leading_directions(deltas, 5, seed=5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].dtype == first[1].dtype == torch.float32
    torch.set_rng_state(state)
    leading_directions(deltas, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("deltas", "count", "fault"),
    [
        (torch.ones(3), 1, r"shape \[3\]"),
        (torch.ones(0, 4), 1, r"shape \[0, 4\]"),
        (torch.ones(3, 4), 0, "positive, got 0"),
        (torch.tensor([[1.0, torch.nan]]), 1, "not finite"),
    ],
)
def test_what_has_no_directions_is_refused(deltas: Tensor, count: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        leading_directions(deltas, count, seed=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(2, 200), share=st.floats(0.0, 0.9), inside=st.floats(0.0, 1e6), seed=st.integers(0, 2**31 - 1))
def test_folding_leaves_at_most_a_millionth_inside(width: int, share: float, inside: float, seed: int) -> None:
    """However much was inside: up to 1e12 times the energy of what remains."""
    directions = orthonormal(width, int(share * width), seed=seed)
    outside = normal(16, width, seed=seed + 1)
    b = outside + inside * normal(16, directions.shape[1], seed=seed + 2) @ directions.T
    folded = fold(b, directions)
    assert protected_energy(folded, directions) <= 1e-10
    exact = b.double() - b.double() @ directions.double() @ directions.double().T
    torch.testing.assert_close(folded.double(), exact, rtol=1e-4, atol=1e-5 * (1 + inside))


def test_projecting_changes_nothing_outside_and_removes_what_is_inside() -> None:
    directions = torch.eye(5)[:, :2]
    b = torch.tensor([[3.0, 4.0, 1.0, 0.0, -2.0]])
    assert torch.equal(project(b, directions), torch.tensor([[0.0, 0.0, 1.0, 0.0, -2.0]]))
    assert torch.equal(project(b, directions[:, :0]), b)
    assert torch.equal(fold(b, directions), project(b, directions))


def test_gradient_through_the_projection_lies_outside() -> None:
    directions, b = orthonormal(24, 6, seed=1), normal(4, 24, seed=2).requires_grad_()
    project(b, directions).pow(3).sum().backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None
    assert b.grad.norm() > 1
    assert (b.grad @ directions).norm() < 1e-4


def test_protected_energy_is_the_share_of_the_squared_norm() -> None:
    directions = torch.eye(4)[:, :1]
    assert protected_energy(torch.tensor([[3.0, 0.0, 4.0, 0.0]]), directions) == pytest.approx(9 / 25)
    assert protected_energy(torch.tensor([[3.0, 0.0, 4.0, 0.0]]).bfloat16(), directions) == pytest.approx(9 / 25)
    assert protected_energy(torch.zeros(2, 4), directions) == 0.0
    assert protected_energy(torch.ones(2, 4), directions[:, :0]) == 0.0
