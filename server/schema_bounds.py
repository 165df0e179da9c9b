"""Bounds what the JSON schemas of a request may cost to compile and to follow. Knows their size, not their meaning.

Within these bounds the costliest schemas that were found (tests/costly_schemas.py) took at most 0.3 s to compile, and a
token of their answers mostly under 1 ms, at most 45 ms of one core (vocabulary of 49,152; `python -m
tests.benchmarks.structured`). Beyond them the cost of a token grows with the square of what may come next: with 1,000
properties it is 80 ms, with an `allOf` of nine `anyOf` over a second. Two multiples of four digits that one number has
to be, or may be, compile for seconds.
"""

import json
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

from server.errors import InvalidRequest

# Of all schemas of a request together.
MAX_CHARACTERS = 64 * 1024  # as compact JSON, without descriptions and the like
MAX_MULTIPLES = 100_000  # the sum of those below
# Of a number, or of all that one may have to be a multiple of at the same time.
MAX_MULTIPLE = 10_000  # least common, in units of the last decimal place
# Of each schema: what may come next at one place of an answer is all from one.
MAX_DEPTH = 64  # lists and objects inside each other: thirty objects
MAX_PROPERTIES = 500
MAX_DENOMINATOR = 10**12  # of a multiple
MAX_READ = 20_000  # parts in what is combined, each as often as it is referred to; multiples are looked for there
MAX_VARIANTS = 100  # beyond the first of each anyOf and oneOf; null is none

ANNOTATIONS = frozenset(
    {"title", "description", "$comment", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
VALUES = frozenset({"const", "enum"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
CHOICES = ("anyOf", "oneOf")


class SchemaBounds:
    """Checks the schemas of one request, and counts what they have together."""

    def __init__(self) -> None:
        self._num_characters = 0
        self._num_multiples = 0

    def add(self, schema: object, *, param: str, where: str) -> None:
        """InvalidRequest that names the field `where` and the bound that is passed with this schema."""
        try:
            self._add(schema)
        except ValueError as error:
            raise InvalidRequest(f"{where}: {error}", param=param) from error

    def _add(self, schema: object) -> None:
        if is_deeper(schema, MAX_DEPTH):
            raise ValueError(f"the schema is nested deeper than {MAX_DEPTH} levels")
        _check_json(schema)
        schema = _without_annotations(schema)
        self._num_characters += len(json.dumps(schema, separators=(",", ":"), ensure_ascii=False))
        if self._num_characters > MAX_CHARACTERS:
            raise _too_many("with it the schemas have", self._num_characters, "characters", MAX_CHARACTERS)
        objects = list(_objects(schema))
        num_properties = sum(len(one["properties"]) for one in objects if isinstance(one.get("properties"), dict))
        if num_properties > MAX_PROPERTIES:
            raise _too_many("the schema has", num_properties, "properties", MAX_PROPERTIES)
        num_variants = sum(_num_variants(one.get(key)) for one in objects for key in CHOICES)
        if num_variants > MAX_VARIANTS:
            raise _too_many("the schema has", num_variants, "variants of anyOf and oneOf", MAX_VARIANTS)
        if all(_multiple(one) is None for one in objects):
            return
        for together in _multiples(schema):
            self._num_multiples += _least_common(together)
            if self._num_multiples > MAX_MULTIPLES:
                raise _too_many("with it the schemas have", self._num_multiples, "units of multipleOf", MAX_MULTIPLES)


def _multiples(schema: object) -> Iterator[set[float]]:
    """Every `multipleOf`, beside the others that the same number may have to keep to."""
    references = _References(schema)
    todo = [schema]
    num_read = 0
    while todo:
        node = todo.pop()
        if isinstance(node, dict) and _is_joint(node):
            joint = list(islice(references.reachable(node), MAX_READ - num_read))
            num_read += len(joint)
            if num_read == MAX_READ:
                raise ValueError(
                    f"what is combined by allOf, anyOf and the like has {MAX_READ} parts, counting repeats"
                )
            yield {number for number in map(_multiple, joint) if number is not None}
        else:
            if (number := _multiple(node)) is not None:
                yield {number}
            todo.extend(_children(node))


def _is_joint(schema: dict[str, Any]) -> bool:
    """Whether one value may have to keep to, or be told by, several of the schemas in it."""
    if "allOf" in schema or "patternProperties" in schema or any(_num_variants(schema.get(key)) for key in CHOICES):
        return True
    others = [key for key in ("$ref", *CHOICES) if key in schema]
    return bool(others) and len(schema.keys() - NAMED - {"$schema"}) > 1


class _References:
    """What the parts of one schema say of each other."""

    def __init__(self, root: object) -> None:
        self._root = root
        # To which references may be relative.
        self._has_names = any("$id" in one or "id" in one for one in _objects(root))
        self._found: dict[str, object] = {}

    def reachable(self, node: object) -> Iterator[object]:
        """Everything in it, and in what it refers to."""
        todo, followed = [node], set()
        while todo:
            one = todo.pop()
            yield one
            todo.extend(_children(one))
            reference = one.get("$ref") if isinstance(one, dict) else None
            if isinstance(reference, str) and reference not in followed:
                followed.add(reference)
                todo.append(self._at(reference))

    def _at(self, reference: str) -> object:
        if reference not in self._found:
            self._found[reference] = self._find(reference)
        return self._found[reference]

    def _find(self, reference: str) -> object:
        """What a plain reference names; the whole for any other, which may name anything in it."""
        if self._has_names or not reference.startswith("#") or "%" in reference:
            return self._root
        node = self._root
        for name in reference.split("/")[1:]:
            node = node.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
        return self._root if node is None else node


def _multiple(node: object) -> float | None:
    number = node.get("multipleOf") if isinstance(node, dict) else None
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def _least_common(numbers: Iterable[float]) -> int:
    """In units of the last place. What is a multiple of each of several numbers costs as much as one of this."""
    multiple, unit = 1, 1
    for place, number in enumerate(numbers):
        if number <= 0:
            raise ValueError(f"multipleOf is {number}, it must be above 0")
        exact, finer = Fraction(str(number)), unit
        if exact.denominator > MAX_DENOMINATOR:
            raise ValueError(f"multipleOf is {str(number)[:20]}, it has too many decimal places")
        while (exact * finer).denominator > 1:
            finer *= 10
        steps = int(exact * finer)
        multiple, unit = math.lcm(multiple * (finer // unit) if place else steps, steps), finer
        if multiple > MAX_MULTIPLE:
            among = ", and the least common multiple of those of one number" if place else ", which"
            raise ValueError(
                f"multipleOf is {str(number)[:20]}{among} has more than {MAX_MULTIPLE} units of the last decimal place"
            )
    return multiple


def is_deeper(node: object, most: int) -> bool:
    """Whether more than `most` lists and objects lie in each other."""
    level = [node]
    for _ in range(most):
        level = [child for one in level for child in _children(one)]
    return any(isinstance(one, dict | list) for one in level)


def _check_json(schema: object) -> None:
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:  # numbers that are none, half surrogate pairs
        raise ValueError(f"the schema is not valid JSON: {error}") from error


def _without_annotations(schema: object) -> Any:
    """What is compiled of a schema: tools may be described at length."""
    if isinstance(schema, list):
        return [_without_annotations(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            kept[key] = {name: _without_annotations(one) for name, one in value.items()}
        elif key in VALUES:
            kept[key] = value
        elif key not in ANNOTATIONS:
            kept[key] = _without_annotations(value)
    return kept


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
