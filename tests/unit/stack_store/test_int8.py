"""int8 rows come back within half of their scale."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stack_store.int8 import dequantise_rows, quantise_rows


@settings(deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    num_rows=st.integers(1, 5),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    exponent=st.integers(-30, 30),
)
def test_every_value_comes_back_within_half_of_its_rows_scale(
    seed: int, num_rows: int, widths: list[int], exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, sum(widths), generator=generator) * 10.0**exponent
    values[0, : widths[0]] = 0  # a block of zeros has nothing to scale by
    quantised, scales = quantise_rows(values, widths)
    assert quantised.dtype == torch.int8
    assert scales.shape == (num_rows, len(widths))
    restored = dequantise_rows(quantised, scales, widths, torch.float32)
    bound = scales.repeat_interleave(torch.tensor(widths), dim=1) * 0.5001
    assert ((restored - values).abs() <= bound).all()
    assert (restored[0, : widths[0]] == 0).all()
