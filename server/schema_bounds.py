"""Bounds what a client's JSON schema may cost to compile and to follow. Knows its size, not its meaning.

Within these bounds the costliest schemas that were found took at most 70 ms to compile, and a step of their answers at
most 9 ms, both rarely (vocabulary of 49,152, one thread; `python -m tests.benchmarks.structured`). Beyond them a
`multipleOf` of six digits takes seconds and hundreds of megabytes, and 5,000 properties 75 ms a step.
"""

import json
from collections.abc import Iterator
from typing import Any

from server.errors import InvalidRequest

MAX_CHARACTERS = 64 * 1024  # of all schemas of a request together, as compact JSON
MAX_DEPTH = 64  # lists and objects inside each other: thirty objects
MAX_PROPERTIES = 500  # of all objects together
MAX_MULTIPLE_OF = 10_000


def check_bounds(schema: object, *, param: str, where: str) -> str:
    """The schema as JSON. InvalidRequest that names the field `where` and the bound that is passed."""

    def refuse(reason: str) -> InvalidRequest:
        return InvalidRequest(f"{where}: {reason}", param=param)

    if _depth(schema) > MAX_DEPTH:
        raise refuse(f"the schema is nested deeper than {MAX_DEPTH} levels")
    try:
        text = json.dumps(schema, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        text.encode()
    except ValueError as error:  # numbers that are none, half surrogate pairs
        raise refuse(f"the schema is not valid JSON: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise refuse(f"the schema has {len(text)} characters, at most {MAX_CHARACTERS} are supported")
    objects = [node for node in _nodes(schema) if isinstance(node, dict)]
    num_properties = sum(len(node["properties"]) for node in objects if isinstance(node.get("properties"), dict))
    if num_properties > MAX_PROPERTIES:
        raise refuse(f"the schema has {num_properties} properties, at most {MAX_PROPERTIES} are supported")
    for node in objects:
        if isinstance(number := node.get("multipleOf"), int | float) and number > MAX_MULTIPLE_OF:
            raise refuse(f"multipleOf is {number}, at most {MAX_MULTIPLE_OF} is supported")
    return text


def _depth(schema: object) -> int:
    """How deep lists and objects lie in each other; not counted beyond what is allowed."""
    depth, level = 0, [schema]
    while level and depth <= MAX_DEPTH:
        level = [child for node in level for child in _children(node)]
        depth += 1
    return depth


def _nodes(schema: object) -> Iterator[object]:
    todo = [schema]
    while todo:
        yield (node := todo.pop())
        todo.extend(_children(node))


def _children(node: object) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list) else []
