"""Changes go into a recipe's content table by table."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.overrides import merged, with_changes

# A key is always of one kind here, a table or a number, so that paths tell everything.
LEAVES = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), max_size=3)
CONTENTS = st.builds(
    lambda numbers, tables: {**numbers, **tables},
    LEAVES,
    st.dictionaries(st.sampled_from(["A", "B"]), LEAVES.map(dict[str, Any]), max_size=2),
)


def paths(content: Mapping[str, Any], *, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield (*prefix, key), {}
            yield from paths(value, prefix=(*prefix, key))
        else:
            yield (*prefix, key), value


@given(CONTENTS, CONTENTS, CONTENTS)
def test_each_path_has_its_latest_value(one: dict[str, Any], other: dict[str, Any], third: dict[str, Any]) -> None:
    before = deepcopy((one, other, third))
    expected = dict(paths(one)) | dict(paths(other)) | dict(paths(third))
    assert dict(paths(merged(one, other, third))) == expected
    assert merged(merged(one, other), third) == merged(one, merged(other, third)) == merged(one, other, third)
    assert merged(one, one) == merged(one) == merged({}, one) == one
    assert (one, other, third) == before


def test_lists_and_tables_in_place_of_numbers_are_replaced() -> None:
    assert merged({"a": [1, 2], "b": 1, "c": {"x": 1}}, {"a": [3], "b": {"x": 1}, "c": 2}) == {
        "a": [3],
        "b": {"x": 1},
        "c": 2,
    }


def test_a_change_of_domain_goes_into_every_domain() -> None:
    recipe = {"seed": 1, "domains": [{"name": "a", "held_out": 9}, {"name": "b"}]}
    assert with_changes(recipe, {"stack": {"rank": 2}, "domain": {"held_out": 4}}) == {
        "seed": 1,
        "stack": {"rank": 2},
        "domains": [{"name": "a", "held_out": 4}, {"name": "b", "held_out": 4}],
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "seed: .*'seeds'"),
        ({"domains": []}, "domains: .*'domains'"),
        ({"domain": 3}, "domain: .*got 3"),
        ({"domain": {"name": "x"}}, "domain.name: .*'x'"),
        ({"domain": {"files": ["x"]}}, r"domain.files: .*\['x'\]"),
    ],
)
def test_what_makes_a_recipe_that_recipe_cannot_be_changed(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        with_changes({"domains": [{"name": "a"}]}, changes)
