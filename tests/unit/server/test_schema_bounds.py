"""Schemas that would cost too much are refused by name before anything is compiled."""

from typing import Any

import pytest

from server.errors import InvalidRequest
from server.schema_bounds import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_PROPERTIES,
    MAX_VARIANTS,
    SchemaBounds,
    is_deeper,
)

STRING, NULL = {"type": "string"}, {"type": "null"}
M1 = {"multipleOf": 9973}
DEFS = {"$defs": {"a": M1, "b": {"$ref": "#/$defs/a"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": STRING for number in range(count)}}


def multiples(*numbers: float) -> dict[str, Any]:
    return {"type": "number", "allOf": [{"multipleOf": number} for number in numbers]}


def several_numbers(count: int) -> dict[str, Any]:
    """Each of which is on its own."""
    return {"properties": {f"n{number}": {"multipleOf": 10_000 - number} for number in range(count)}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        nested(MAX_DEPTH // 2 - 1),
        wide(MAX_PROPERTIES),
        {"enum": ["x" * (MAX_CHARACTERS - len('{"enum":[""]}'))]},
        {"anyOf": [STRING] * (MAX_VARIANTS + 1)},
        {"type": "object", "properties": {f"p{number}": {"anyOf": [STRING, NULL]} for number in range(MAX_PROPERTIES)}},
        multiples(10_000),
        multiples(100, 0.01),
        multiples(*[0.01] * 100, 0.5, 15),
        multiples(1e-12),
        several_numbers(10),
        {"properties": {"price": {"multipleOf": 0.01}, "size": {"multipleOf": 128}}},
        {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, NULL]}, "b": {"multipleOf": 9967}}, **DEFS},
        {"properties": {"description": {"type": "string", "description": "x" * MAX_CHARACTERS}}},
        {"$ref": "#/$defs/a", "description": "a number", **DEFS},
        {"allOf": [{"$ref": "#/$defs/none"}, {"$ref": "other.json"}, {"$ref": "#/$defs/a/multipleOf/x"}], **DEFS},
        {"$schema": "x", "$ref": "#/definitions/r", "definitions": {"r": several_numbers(2)}},
        {"$ref": "#/$defs/c", "$defs": {"c": {"allOf": [{"$ref": "#/$defs/c"}]}}},
        {"multipleOf": True, "properties": {"multipleOf": STRING, "anyOf": STRING}},
    ],
)
def test_what_is_within_the_bounds_passes(schema: dict[str, Any]) -> None:
    SchemaBounds().add(schema, param="tools", where="x")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (nested(MAX_DEPTH // 2 + 1), "deeper than 64"),
        (nested(5000), "deeper than 64"),
        (wide(MAX_PROPERTIES + 1), "501 properties"),
        ({"anyOf": [wide(300), wide(300)]}, "600 properties"),
        ({"anyOf": [STRING] * (MAX_VARIANTS + 2)}, "101 variants"),
        ({"anyOf": [STRING] * 60, "oneOf": [STRING] * 60}, "118 variants"),
        ({"enum": ["x" * MAX_CHARACTERS]}, "characters"),
        ({"const": {"description": "x" * MAX_CHARACTERS}}, "characters"),
        ({"properties": {"x" * MAX_CHARACTERS: STRING}}, "characters"),
        ({"properties": {"a": {"multipleOf": 99991}}}, "multipleOf is 99991"),
        ({"multipleOf": 0.99991}, "multipleOf is 0.99991"),
        (multiples(9973, 9967), "multipleOf is .*least common multiple"),
        ({"anyOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "least common multiple"),
        ({"$ref": "#/$defs/a", "multipleOf": 9967, **DEFS}, "least common multiple"),
        ({"$ref": "#/%24defs/a", "multipleOf": 9967, **DEFS}, "least common multiple"),
        ({"$ref": "json-schema:///#/$defs/a", "multipleOf": 9967, **DEFS}, "least common multiple"),
        ({"$id": "http://e.x/r", "$ref": "http://e.x/r#/$defs/a", "multipleOf": 9967, **DEFS}, "least common multiple"),
        ({"prefixItems": [{"multipleOf": 1e-300}] * 2500}, "decimal places"),
        ({"allOf": [{"$ref": "#/$defs/b"}, {"multipleOf": 9967}], **DEFS}, "least common multiple"),
        (
            {"allOf": [{"$ref": "#/prefixItems/1"}, {"multipleOf": 9967}], "prefixItems": [{}, M1]},
            "least common multiple",
        ),
        ({"anyOf": [{"$ref": "#/$defs/b"}], "multipleOf": 9967, **DEFS}, "least common multiple"),
        ({"properties": {"a": M1}, "patternProperties": {"a|b": {"multipleOf": 9967}}}, "least common multiple"),
        (several_numbers(11), "109945 units of multipleOf"),
        (multiples(9973, 1e-12), "least common multiple"),
        (
            {"items": [{"allOf": [{"$ref": "#/$defs/d"}]}] * 300, "$defs": {"d": wide(200), **DEFS["$defs"]}},
            "20000 parts",
        ),
        ({"a": [0] * 15_000, "m": M1, "b": [{"allOf": [], "$ref": "#/a"}] * 1000}, "20000 parts"),
        ({"a": {"$ref": "#" + "/a" * 15_000}, "m": M1, "b": [{"allOf": [{"$ref": "#/a"}]}] * 1000}, "20000 parts"),
        ({"multipleOf": 10**4000}, "multipleOf"),
        ({"multipleOf": 1e300}, "multipleOf"),
        ({"multipleOf": 0}, "multipleOf is 0, it must be above 0"),
        ({"multipleOf": -3}, "multipleOf is -3, it must be above 0"),
        ({"const": float("nan")}, "not valid JSON"),
        ({"const": "\ud800"}, "not valid JSON"),
    ],
)
def test_bound_that_is_passed_is_named(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        SchemaBounds().add(schema, param="tools", where="tools.3.function.parameters")
    assert caught.value.param == "tools"
    assert "tools.3.function.parameters" in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"enum": ["x" * 40_000]}, {"enum": ["x" * 40_000]}, "with it the schemas have 80026 characters"),
        (several_numbers(6), several_numbers(6), "with it the schemas have 109970 units of multipleOf"),
    ],
)
def test_schemas_of_a_request_are_counted_together(first: dict[str, Any], second: dict[str, Any], said: str) -> None:
    bounds = SchemaBounds()
    bounds.add(first, param="response_format", where="first")
    with pytest.raises(InvalidRequest, match=f"second: {said}") as caught:
        bounds.add(second, param="tools", where="second")
    assert caught.value.param == "tools"


def test_many_tools_may_have_many_properties_together() -> None:
    bounds = SchemaBounds()
    for number in range(5):
        bounds.add(wide(MAX_PROPERTIES // 2), param="tools", where=f"tools.{number}")


def test_depth_counts_lists_and_objects() -> None:
    assert not is_deeper([[1]], 2)
    assert is_deeper([[{}]], 2)
    assert is_deeper({"a": {"b": [1]}}, 2)
    assert not is_deeper("x", 0)
