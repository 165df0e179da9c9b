"""Schemas that would cost too much are refused by name before anything is compiled."""

from typing import Any

import pytest

from server.errors import InvalidRequest
from server.schema_bounds import MAX_CHARACTERS, MAX_DEPTH, MAX_PROPERTIES, check_bounds


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(count)}}


@pytest.mark.parametrize("schema", [nested(MAX_DEPTH // 2 - 1), wide(MAX_PROPERTIES), {"multipleOf": 10_000}, {}])
def test_what_is_within_the_bounds_is_written_as_json(schema: dict[str, Any]) -> None:
    assert check_bounds(schema, param="tools", where="x").startswith("{")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (nested(MAX_DEPTH // 2 + 1), "deeper than 64"),
        (nested(5000), "deeper than 64"),
        (wide(MAX_PROPERTIES + 1), "501 properties"),
        ({"anyOf": [wide(300), wide(300)]}, "600 properties"),
        ({"enum": ["x" * MAX_CHARACTERS]}, "characters"),
        ({"properties": {"a": {"multipleOf": 99991}}}, "multipleOf is 99991"),
        ({"const": float("nan")}, "not valid JSON"),
        ({"const": "\ud800"}, "not valid JSON"),
    ],
)
def test_bound_that_is_passed_is_named(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        check_bounds(schema, param="tools", where="tools.3.function.parameters")
    assert caught.value.param == "tools"
    assert "tools.3.function.parameters" in str(caught.value)
