"""Bounds what the JSON schemas of a request may cost to compile and to follow. Knows their size, not their meaning.

Within these bounds the costliest schemas that were found (tests/costly_schemas.py) took at most 60 ms to compile, and a
token of their answers mostly under 1 ms, at most 45 ms of one core (vocabulary of 49,152; `python -m
tests.benchmarks.structured`). Beyond them the cost of a token grows with the square of what may come next: with 1,000
properties it is 80 ms, with an `allOf` of nine `anyOf` over a second. Two multiples of four digits compile for seconds.
"""

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from server.errors import InvalidRequest

# Of all schemas of a request together.
MAX_CHARACTERS = 64 * 1024  # as compact JSON
MAX_MULTIPLE = 10_000  # least common, in units of the last decimal place
# Of each schema: what may come next at one place of an answer is all from one.
MAX_DEPTH = 64  # lists and objects inside each other: thirty objects
MAX_PROPERTIES = 500
MAX_VARIANTS = 100  # beyond the first of each anyOf and oneOf; null is none


class SchemaBounds:
    """Checks the schemas of one request, and counts what they have together."""

    def __init__(self) -> None:
        self._num_characters = 0
        self._multiple: int | None = None  # in units
        self._unit = 1  # this many of them are 1

    def add(self, schema: object, *, param: str, where: str) -> None:
        """InvalidRequest that names the field `where` and the bound that is passed with this schema."""
        try:
            self._add(schema)
        except ValueError as error:
            raise InvalidRequest(f"{where}: {error}", param=param) from error

    def _add(self, schema: object) -> None:
        if is_deeper(schema, MAX_DEPTH):
            raise ValueError(f"the schema is nested deeper than {MAX_DEPTH} levels")
        self._num_characters += _num_characters(schema)
        if self._num_characters > MAX_CHARACTERS:
            raise _too_many("with it the schemas have", self._num_characters, "characters", MAX_CHARACTERS)
        objects = list(_objects(schema))
        num_properties = sum(len(one["properties"]) for one in objects if isinstance(one.get("properties"), dict))
        if num_properties > MAX_PROPERTIES:
            raise _too_many("the schema has", num_properties, "properties", MAX_PROPERTIES)
        num_variants = sum(_num_variants(one.get(key)) for one in objects for key in ("anyOf", "oneOf"))
        if num_variants > MAX_VARIANTS:
            raise _too_many("the schema has", num_variants, "variants of anyOf and oneOf", MAX_VARIANTS)
        for number in (one.get("multipleOf") for one in objects):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._add_multiple(number)

    def _add_multiple(self, number: float) -> None:
        """What is a multiple of several numbers is one of their least common multiple, and costs as much."""
        if number <= 0:
            raise ValueError(f"multipleOf is {number}, it must be above 0")
        exact, unit = Fraction(str(number)), self._unit
        while (exact * unit).denominator > 1:
            unit *= 10
        steps = int(exact * unit)
        earlier = steps if self._multiple is None else self._multiple * (unit // self._unit)
        self._multiple, self._unit = math.lcm(earlier, steps), unit
        if self._multiple > MAX_MULTIPLE:
            raise ValueError(
                f"multipleOf is {str(number)[:20]}, and the least common multiple of all of them would have more than "
                f"{MAX_MULTIPLE} units of their last decimal place"
            )


def is_deeper(node: object, most: int) -> bool:
    """Whether more than `most` lists and objects lie in each other."""
    level = [node]
    for _ in range(most):
        level = [child for one in level for child in _children(one)]
    return any(isinstance(one, dict | list) for one in level)


def _num_characters(schema: object) -> int:
    try:
        text = json.dumps(schema, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        text.encode()
    except ValueError as error:  # numbers that are none, half surrogate pairs
        raise ValueError(f"the schema is not valid JSON: {error}") from error
    return len(text)


def _num_variants(choice: object) -> int:
    """Those that an answer may turn out to be beside the first."""
    if not isinstance(choice, list):
        return 0
    return max(0, sum(variant != {"type": "null"} for variant in choice) - 1)


def _objects(schema: object) -> Iterator[dict[str, Any]]:
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
        todo.extend(_children(node))


def _children(node: object) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list) else []


def _too_many(who: str, count: int, what: str, most: int) -> ValueError:
    return ValueError(f"{who} {count} {what}, at most {most} are supported")
