"""What is stored lies outside the protected directions, on the values that the format has, near what it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stack_store.int8 import dequantise_rows, quantise_rows
from training.null_space import fold, protected_energy
from training.rounding import StoredWeights, quantise_outside

PROMISE = 1e-6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folded(rank_rows: int, width: int, directions: int, *, seed: int, size: float = 0.02) -> tuple[Tensor, Tensor]:
    columns = torch.linalg.qr(normal(width, directions, seed=seed).double()).Q.float()
    return fold(normal(rank_rows, width, seed=seed + 1) * size, columns), columns


def stored(values: Tensor, weights: StoredWeights) -> Tensor:
    """What a reader of the stack file gets in float32."""
    if weights == "bf16":
        return values.to(torch.bfloat16).float()
    return dequantise_rows(*quantise_rows(values, [values.shape[1]]), [values.shape[1]], torch.float32)


def squared_error(values: Tensor, b: Tensor) -> float:
    return float((values.double() - b.double()).square().sum())


def relative_error(values: Tensor, b: Tensor) -> float:
    return squared_error(values, b) / float(b.double().square().sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    weights=st.sampled_from(["bf16", "int8"]),
    rank_rows=st.integers(1, 8),
    width=st.integers(1, 150),
    share=st.floats(0.0, 0.5),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**31 - 2),
)
def test_values_are_stored_exactly_and_no_worse_than_rounded_to_the_nearest(
    weights: StoredWeights, rank_rows: int, width: int, share: float, exponent: int, seed: int
) -> None:
    b, directions = folded(rank_rows, width, int(share * width), seed=seed, size=10.0**exponent)
    b[0] = 0  # a row of zeros has nothing to scale by
    values = quantise_outside(b, directions, weights)
    torch.testing.assert_close(stored(values, weights), values, rtol=1e-6, atol=0.0)
    nearest = stored(b, weights)
    assert protected_energy(values, directions) <= protected_energy(nearest, directions) * 1.001 + 1e-12
    assert squared_error(values, b) <= 8 * squared_error(nearest, b)
    assert (values[0] == 0).all()


@pytest.mark.parametrize(("width", "directions"), [(192, 48), (576, 144)])
def test_bf16_keeps_the_promise_at_a_quarter_of_the_outputs(width: int, directions: int) -> None:
    b, columns = folded(64, width, directions, seed=1)
    values = quantise_outside(b, columns, "bf16")
    assert protected_energy(stored(values, "bf16"), columns) < PROMISE / 8
    assert relative_error(values, b) < 1e-5


@pytest.mark.parametrize(("width", "directions"), [(192, 30), (576, 90)])
def test_int8_keeps_the_promise_at_a_sixth_of_the_outputs(width: int, directions: int) -> None:
    b, columns = folded(64, width, directions, seed=1)
    assert protected_energy(stored(b, "int8"), columns) > 6 * PROMISE  # rounded to the nearest, it does not
    values = quantise_outside(b, columns, "int8")
    assert protected_energy(stored(values, "int8"), columns) < PROMISE
    assert relative_error(values, b) < 2e-4


def test_without_directions_every_value_is_the_nearest() -> None:
    b = normal(4, 30, seed=1)
    assert torch.equal(quantise_outside(b, torch.zeros(30, 0), "bf16"), b.to(torch.bfloat16).float())
    torch.testing.assert_close(quantise_outside(b, torch.zeros(30, 0), "int8"), stored(b, "int8"), rtol=1e-6, atol=0.0)


def test_the_largest_bf16_stays_finite_and_what_bf16_cannot_hold_is_refused() -> None:
    largest = torch.finfo(torch.bfloat16).max
    b = torch.full((1, 4), largest)
    b[0, 1:] = torch.tensor([-largest, 1.0, -1e-40])
    assert quantise_outside(b, torch.full((4, 1), 0.5), "bf16").isfinite().all()
    with pytest.raises(ValueError, match="not finite in bf16"):
        quantise_outside(torch.tensor([[3.4e38, 1.0]]), torch.zeros(2, 0), "bf16")


def test_rounding_is_reproducible() -> None:
    b, columns = folded(8, 100, 25, seed=4)
    state = torch.get_rng_state()
    assert torch.equal(quantise_outside(b, columns, "int8"), quantise_outside(b, columns, "int8"))
    assert torch.equal(torch.get_rng_state(), state)
