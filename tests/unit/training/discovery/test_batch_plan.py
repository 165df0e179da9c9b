"""Batches hold every row once, within the budget, and few domains each."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.discovery.batch_plan import (
    DOMAIN_COST,
    PASS_COST,
    PlannedBatch,
    RowShape,
    cut_by_length,
    plan_batches,
)

shapes = st.lists(
    st.builds(RowShape, length=st.integers(1, 60), domains=st.frozensets(st.sampled_from("abc"))), max_size=40
)
budgets = st.integers(1, 200)


@given(shapes, budgets)
def test_every_row_is_in_one_batch_that_fits_or_is_alone(rows: list[RowShape], max_tokens: int) -> None:
    batches = plan_batches(rows, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or max(rows[index].length for index in batch) * len(batch) <= max_tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 900))
def test_rows_of_one_set_are_cut_at_least_cost(lengths: list[int], max_tokens: int) -> None:
    rows = [RowShape(length, frozenset("a")) for length in lengths]
    batches = cut_by_length(rows, range(len(rows)), max_tokens=max_tokens)
    order = sorted(lengths, reverse=True)
    costs = []
    for cuts in (cuts for size in range(len(order)) for cuts in combinations(range(1, len(order)), size)):
        parts = [order[start:end] for start, end in pairwise((0, *cuts, len(order)))]
        if all(len(part) == 1 or part[0] * len(part) <= max_tokens for part in parts):
            costs.append(sum(PASS_COST + part[0] * len(part) * (1 + DOMAIN_COST) for part in parts))
    assert sum(batch.cost for batch in batches) == pytest.approx(min(costs))


@given(shapes, budgets)
def test_sharing_batches_never_costs_more_than_a_set_each(rows: list[RowShape], max_tokens: int) -> None:
    apart = [
        batch
        for domains in {row.domains for row in rows}
        for batch in cut_by_length(
            rows, [index for index, row in enumerate(rows) if row.domains == domains], max_tokens=max_tokens
        )
    ]
    planned = [
        PlannedBatch(
            tuple(batch),
            max(rows[index].length for index in batch),
            frozenset[str]().union(*(rows[index].domains for index in batch)),
        )
        for batch in plan_batches(rows, max_tokens=max_tokens)
    ]
    assert sum(batch.cost for batch in planned) <= sum(batch.cost for batch in apart) * (1 + 1e-9)


def test_long_rows_of_one_set_keep_to_themselves_and_short_ones_of_many_share() -> None:
    a, b = frozenset("a"), frozenset("b")
    rows = [RowShape(300, a), RowShape(10, b), RowShape(300, b), RowShape(12, a), RowShape(300, a), RowShape(300, b)]
    batches = sorted(sorted(batch) for batch in plan_batches(rows, max_tokens=600))
    assert batches == [[0, 4], [1, 3], [2, 5]]
