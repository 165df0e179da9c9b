"""Writes the grammar of the answers that a request allows: JSON of a schema, calls of tools. Knows no tokens.

The grammar is in llguidance's form of Lark. JSON is written as json.dumps writes it: one line, a space behind each
comma and colon. Whitespace that is free is where small models lose themselves.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequest
from server.schema_bounds import SchemaBounds
from server.tool_format import CALL_BEGIN, CALL_END, CALL_MARK, NAME_END
from server.tool_schemas import Function, NamedChoice, ResponseFormat, Tool, ToolChoice

MAX_CALLS = 16  # in one answer

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be. `param` is the field to blame if its grammar cannot be compiled."""

    grammar: str | None  # None: any text
    functions: tuple[Function, ...]  # that the model is told of; their calls are looked for in the answer
    param: str = "response_format"
    content: str | None = None  # beside tools: what response_format alone asks for, to blame it for its own faults


def read_form(
    response_format: ResponseFormat | None,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    *,
    parallel_calls: bool,
) -> AnswerForm:
    """The form that a request's fields ask for. InvalidRequest for names and schemas that will not do."""
    bounds = SchemaBounds()
    content = _content_rule(response_format, bounds)
    functions = _functions(tools or [])
    if tool_choice is None:
        tool_choice = "auto" if functions else "none"
    if isinstance(tool_choice, NamedChoice):
        functions = tuple(one for one in functions if one.name == tool_choice.function.name)
        if not functions:
            raise InvalidRequest(
                f"tool_choice: {tool_choice.function.name!r} is not one of the tools", param="tool_choice"
            )
        parallel_calls = False
    elif tool_choice == "required" and not functions:
        raise InvalidRequest("tool_choice: required needs tools", param="tool_choice")
    alone = None if content is None else f"start: {content}"
    if tool_choice == "none" or not functions:
        return AnswerForm(alone, ())
    numbered = [(number, tool.function) for number, tool in enumerate(tools or []) if tool.function in functions]
    calls = [_call(number, one.name, _arguments_rule(one, number, bounds)) for number, one in numbered]
    rules = _start(content, is_forced=tool_choice != "auto", most=MAX_CALLS if parallel_calls else 1)
    any_call = "call: " + " | ".join(f"call_{number}" for number, _ in numbered)
    return AnswerForm("\n".join([*rules, any_call, *calls]), functions, param="tools", content=alone)


def _content_rule(response_format: ResponseFormat | None, bounds: SchemaBounds) -> str | None:
    if response_format is None or response_format.type == "text":
        return None
    schema = response_format.json_schema.schema_ if response_format.json_schema is not None else None
    if response_format.type == "json_object" or schema is None:
        return _json({"type": "object"})
    bounds.add(schema, param="response_format", where="response_format.json_schema.schema")
    return _json(schema)


def _functions(tools: Sequence[Tool]) -> tuple[Function, ...]:
    names: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequest(f"tools.{number}.function.name: {tool.function.name!r} is there twice", param="tools")
        names.add(tool.function.name)
    return tuple(tool.function for tool in tools)


def _arguments_rule(function: Function, number: int, bounds: SchemaBounds) -> str:
    schema = function.parameters or NO_PARAMETERS
    where = f"tools.{number}.function.parameters"
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{where}: must describe an object, got type {schema['type']!r}", param="tools")
    bounds.add(schema, param="tools", where=where)
    return _json({"type": "object", **schema}, is_strict=function.strict is True)


def _start(content: str | None, *, is_forced: bool, most: int) -> list[str]:
    """Calls one behind the other; unless they are forced, text or JSON instead, or text before the first of them."""
    calls = f'call ("\\n" "{CALL_MARK}" call){{0,{most - 1}}}' if most > 1 else "call"
    if is_forced:
        return [f'start: "{CALL_MARK}" {calls}']
    if content is not None:
        return [f'start: content | "{CALL_MARK}" {calls}', f"content: {content}"]
    # Lazy: text ends at the first mark of a call, and behind it a call has to follow.
    return [f"start: ANY_TEXT | marked {calls}", f'marked[lazy]: ANY_TEXT "{CALL_MARK}"', "ANY_TEXT: /(.|\\n)*/"]


def _call(number: int, name: str, arguments: str) -> str:
    before = json.dumps(CALL_BEGIN.removeprefix(CALL_MARK) + name + NAME_END)
    return f"call_{number}: {before} arguments_{number} {json.dumps(CALL_END)}\narguments_{number}: {arguments}"


def _json(schema: Mapping[str, Any], *, is_strict: bool = True) -> str:
    """Our options in place of any that the schema itself brings along.

    Unless it is strict, keywords that cannot be kept to are left out; what is no schema is refused all the same.
    """
    options = SPACING if is_strict else SPACING | {"lenient": True}
    return "%json " + json.dumps({**schema, "x-guidance": options})
