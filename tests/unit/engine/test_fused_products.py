"""The compiled pieces of the fused step, each against plain arithmetic in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numpy.typing import NDArray

from engine.model import fused_kernels
from engine.model.fused_kernels import HAS_DOT_PAIRS, make_tile
from engine.model.fused_step import array_of

Array = NDArray[Any]
DTYPES = [torch.float32, torch.bfloat16]


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> tuple[Array, Array]:
    """Normal numbers as the kernels read them, and the same in float64."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return array_of(tensor), tensor.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 13, 16, 47])
@pytest.mark.parametrize("size", [16, 64, 70, 576])
def test_a_product(tokens: int, size: int, dtype: torch.dtype) -> None:
    weights, exact_weights = drawn(1, 11, size, dtype=dtype)
    x, exact_x = drawn(2, tokens, size, dtype=dtype)
    out = np.full((tokens, 12), 7.0, np.float32)
    fused_kernels._product(weights, 2, 9, x, out)
    np.testing.assert_allclose(out[:, 2:9], exact_x @ exact_weights[2:9].T, rtol=1e-5, atol=1e-4)
    assert (out[:, :2] == 7.0).all()
    assert (out[:, 9:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [70, 576])
def test_a_product_is_the_same_bits_whatever_tokens_are_beside(size: int, dtype: torch.dtype) -> None:
    weights, _ = drawn(1, 24, size, dtype=dtype)
    x, _ = drawn(2, 37, size, dtype=dtype)
    together = np.empty((37, 24), np.float32)
    fused_kernels._product(weights, 0, 24, x, together)
    for first, last in [(0, 1), (1, 3), (3, 6), (6, 10), (10, 19), (19, 37)]:
        apart = np.empty((last - first, 24), np.float32)
        fused_kernels._product(weights, 0, 7, x[first:last], apart)
        fused_kernels._product(weights, 7, 24, x[first:last], apart)
        assert (apart == together[first:last]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dot_pairs", [False, pytest.param(True, marks=pytest.mark.skipif(
    not HAS_DOT_PAIRS, reason="this processor has no bfloat16 dot products"))])  # fmt: skip
def test_a_tile_with_and_without_dot_product_instructions(dot_pairs: bool, dtype: torch.dtype) -> None:
    tile = make_tile(2, 4, dot_pairs=dot_pairs)

    def run(weights: Any, x: Any, out: Any) -> None:
        tile(weights, x, out, 1, 2)

    weights, exact_weights = drawn(1, 4, 128, dtype=dtype)
    x, exact_x = drawn(2, 7, 128, dtype=dtype)
    out = np.zeros((7, 4), np.float32)
    njit(run)(weights, x, out)
    expected = np.zeros((7, 4))
    expected[2:6, 1:3] = exact_x[2:6] @ exact_weights[1:3].T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 3, 4, 6, 9])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 8), (5, 16), (16, 64), (33, 100), (7, 272)])
def test_a_weighted_sum_of_rows(outputs: int, num_rows: int, size: int, dtype: torch.dtype) -> None:
    rows, exact_rows = drawn(1, num_rows, size, dtype=dtype)
    factors, exact_factors = drawn(2, outputs, num_rows, dtype=torch.float32)
    out, before = drawn(3, outputs, size, dtype=torch.float32)
    fused_kernels._add_weighted(factors, rows, out, np.arange(outputs))
    np.testing.assert_allclose(out, before + exact_factors @ exact_rows, rtol=1e-5, atol=1e-5)


def exponentials(x: Array) -> Array:
    """Of every number, by the kernels' function."""

    def run(x: Any, out: Any) -> None:
        for i in range(x.size):
            out[i] = fused_kernels._exp(x[i])

    out = np.empty_like(x)
    njit(run)(x, out)
    return out


def test_the_exponential_function() -> None:
    x = np.linspace(-87, 88, 100_001).astype(np.float32)
    np.testing.assert_allclose(exponentials(x), np.exp(x.astype(np.float64)), rtol=5e-7)
    beyond = exponentials(np.array([-np.inf, -1e30, -100.0, 0.0, np.nan, 1e30, np.inf], np.float32))
    assert (beyond[:3] < 2e-38).all()
    assert beyond[3] == 1.0
    assert np.isnan(beyond[4])
    assert (beyond[5:] > 2e38).all()
