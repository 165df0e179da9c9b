"""The costliest schemas that are known within the bounds of a request."""

from typing import Any

from server.schema_bounds import MAX_DEPTH, MAX_PROPERTIES, MAX_VARIANTS

STRING, NULL = {"type": "string"}, {"type": "null"}
VARIANTS = range(MAX_VARIANTS + 1)


def wide(kind: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """As many properties as there may be."""
    return {"type": "object", "properties": {f"p{number}": kind for number in range(MAX_PROPERTIES)}, **rest}


def variant(number: int, count: int) -> dict[str, Any]:
    """An object of so many properties, the first of which tells it from others."""
    properties = {"kind": {"const": f"k{number}"}, **{f"x{one}": STRING for one in range(count - 1)}}
    return {"type": "object", "properties": properties}


def either(first: str, second: str) -> dict[str, Any]:
    """An object that has the one or the other, or both, or what else it likes."""
    return {"anyOf": [{"type": "object", "properties": {name: STRING}} for name in (first, second)]}


def deep() -> dict[str, Any]:
    """As many objects in each other as there may be."""
    schema: dict[str, Any] = STRING
    for _ in range(MAX_DEPTH // 2 - 1):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def several(items: dict[str, Any]) -> dict[str, Any]:
    """A list of nine or more."""
    return {"type": "array", "minItems": 9, "items": items}


AT_BOUNDS: dict[str, Any] = {
    "optional properties": wide(STRING),
    "optional properties, no others": wide(STRING, additionalProperties=False),
    "required properties": wide(STRING, required=[f"p{number}" for number in range(MAX_PROPERTIES)]),
    "nullable properties": wide({"anyOf": [STRING, NULL]}, additionalProperties=False),
    "variants of objects": {"anyOf": [variant(number, 5) for number in range(100)]},
    "variants of an object": {"anyOf": [variant(number, 1) for number in VARIANTS]},
    "variants of lists": {"anyOf": [several({"type": "integer", "maximum": 9**9 + n}) for n in VARIANTS]},
    "six choices of two": {"allOf": [either(f"a{number}", f"b{number}") for number in range(6)]},
    "a multiple": several({"type": "integer", "multipleOf": 9973}),
    "variants of multiples": several({"anyOf": [{"type": "integer", "multipleOf": n} for n in (97, 103)]}),
    "multiples of their own": {
        "type": "object",
        "properties": {f"n{number}": {"type": "integer", "multipleOf": 9973 - number} for number in range(10)},
    },
    "a long enum": several({"enum": [f"x{number}" for number in range(6000)]}),
    "objects in each other": deep(),
    "a pattern that looks back 12 characters": {"type": "string", "pattern": "^(.*a.{12})$"},
}
