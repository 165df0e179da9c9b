"""What a request asks for is a grammar that takes the right answers and no others."""

import json
import random
from typing import Any

import pytest

from engine.errors import GrammarUnsupported
from engine.grammar import GrammarCompiler
from server.answer_grammar import MAX_CALLS, AnswerForm, read_form
from server.errors import InvalidRequest
from server.tool_format import write_call
from server.tool_schemas import NamedChoice, ResponseFormat, Tool, ToolChoice
from tests.costly_schemas import AT_BOUNDS
from tests.tiny_bases import tiny_tokenizer

X = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "find", "parameters": X}}),
    Tool.model_validate({"type": "function", "function": {"name": "stop"}}),
]
FIND, STOP = write_call("find", {"x": 12}), write_call("stop", {})
JSON = '{"a": [1, {"b": null}], "c": "d"}'
END = 2


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), vocabulary=384, eos_token_ids=frozenset({END}))


def takes(compiler: GrammarCompiler, form: AnswerForm, text: str) -> bool:
    """Whether the text is a whole answer."""
    assert form.grammar is not None
    state = compiler.compile(form.grammar).result(timeout=20).start()
    for token in tiny_tokenizer().encode(text, add_special_tokens=False):
        state.take(token)
    return state.error is None and bool(state.is_complete or state.allowed(384)[END])


def asked(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def form_of(
    choice: ToolChoice | None = None, *, response_format: str | None = None, parallel_calls: bool = True
) -> AnswerForm:
    wanted = None if response_format is None else ResponseFormat(type=response_format)  # type: ignore[arg-type]
    return read_form(wanted, TOOLS, choice, parallel_calls=parallel_calls)


NAMED = NamedChoice.model_validate({"type": "function", "function": {"name": "stop"}})
ANSWERS = {
    "text": "Hello <tool>.",
    "json": JSON,
    "call": FIND,
    "other call": STOP,
    "text and call": f"I look.\n{FIND}",
    "two calls": f"{FIND}\n{STOP}",
    "text behind a call": f"{FIND}\nDone.",
    "unknown function": write_call("fly", {}),
    "wrong arguments": write_call("find", {"x": "y"}),
    "a mark alone": "<tool_call> is how it begins",
    "seventeen calls": "\n".join([STOP] * (MAX_CALLS + 1)),
}


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        (form_of(), {"text", "json", "call", "other call", "text and call", "two calls"}),
        (form_of("auto", parallel_calls=False), {"text", "json", "call", "other call", "text and call"}),
        (form_of("required"), {"call", "other call", "two calls"}),
        (form_of("required", parallel_calls=False), {"call", "other call"}),
        (form_of(NAMED), {"other call"}),
        (form_of("auto", response_format="json_object"), {"json", "call", "other call", "two calls"}),
        (form_of("required", response_format="json_object"), {"call", "other call", "two calls"}),
        (form_of("none", response_format="json_object"), {"json"}),
    ],
)
def test_answers_that_are_taken(compiler: GrammarCompiler, form: AnswerForm, taken: set[str]) -> None:
    assert {name for name, text in ANSWERS.items() if takes(compiler, form, text)} == taken


def test_sixteen_calls_are_taken(compiler: GrammarCompiler) -> None:
    assert takes(compiler, form_of("required"), "\n".join([STOP] * MAX_CALLS))


def test_model_is_told_of_the_tools_that_it_may_call() -> None:
    assert [function.name for function in form_of().functions] == ["find", "stop"]
    assert [function.name for function in form_of(NAMED).functions] == ["stop"]
    assert form_of("none").functions == ()
    assert form_of("none").grammar is None
    assert read_form(None, None, "auto", parallel_calls=True).grammar is None


def test_schema_cannot_bring_options_of_its_own(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "x-guidance": {"item_separator": ";", "lenient": True}}
    form = read_form(asked(schema), None, None, parallel_calls=True)
    assert takes(compiler, form, "[1, 2]")
    assert not takes(compiler, form, "[1;2]")
    assert not takes(compiler, form, "[1,  2]")


@pytest.mark.parametrize(
    ("tools", "choice", "param", "said"),
    [
        (TOOLS, {"type": "function", "function": {"name": "fly"}}, "tool_choice", "'fly'"),
        ([], "required", "tool_choice", "tools"),
        ([], {"type": "function", "function": {"name": "fly"}}, "tool_choice", "'fly'"),
        ([*TOOLS, TOOLS[0]], None, "tools", "'find' is there twice"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(tools: list[Tool], choice: Any, param: str, said: str) -> None:
    choice = choice if choice is None or isinstance(choice, str) else NamedChoice.model_validate(choice)
    with pytest.raises(InvalidRequest, match=said) as caught:
        read_form(None, tools, choice, parallel_calls=True)
    assert caught.value.param == param


def test_parameters_must_describe_an_object() -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}})
    with pytest.raises(InvalidRequest, match=r"tools\.0\.function\.parameters: must describe an object"):
        read_form(None, [tool], None, parallel_calls=True)


def test_all_schemas_of_a_request_share_one_bound() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 1000]}}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": schema}} for n in range(64)]
    with pytest.raises(
        InvalidRequest, match=r"tools\.6.\.function\.parameters: with it the schemas have .* characters"
    ):
        read_form(None, [Tool.model_validate(tool) for tool in tools], None, parallel_calls=True)
    with pytest.raises(InvalidRequest, match=r"tools\.1\.function\.parameters: .* characters"):
        read_form(asked({"enum": ["x" * 65_000]}), [TOOLS[1], Tool.model_validate(tools[0])], None, parallel_calls=True)


def test_tool_is_named_by_its_place_among_all() -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}})
    choice = NamedChoice.model_validate({"type": "function", "function": {"name": "f"}})
    with pytest.raises(InvalidRequest, match=r"tools\.2\.function"):
        read_form(None, [*TOOLS, tool], choice, parallel_calls=True)


# What OpenAI takes for a tool that is not strict, and what no keyword of it keeps to.
LENIENT = [
    {"properties": {"a": {"type": "string", "format": "binary"}}},
    {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}},
    {"propertyNames": {"pattern": "^a"}},
    {"properties": {"a": {"not": {"const": 1}}}},
    {"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
    {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
]


def tool_of(parameters: dict[str, Any], **fields: bool | None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": parameters, **fields}})


@pytest.mark.parametrize("parameters", LENIENT)
def test_tool_that_is_not_strict_may_say_what_cannot_be_kept_to(
    compiler: GrammarCompiler, parameters: dict[str, Any]
) -> None:
    for fields in ({}, {"strict": False}, {"strict": None}):
        form = read_form(None, [tool_of(parameters, **fields)], "required", parallel_calls=True)
        assert takes(compiler, form, write_call("f", {}))
        assert not takes(compiler, form, "<tool_call>\n{")
    for grammar in (
        read_form(None, [tool_of(parameters, strict=True)], "required", parallel_calls=True).grammar,
        read_form(asked({"type": "object", **parameters}), None, None, parallel_calls=True).grammar,
    ):
        assert grammar is not None
        with pytest.raises(GrammarUnsupported):
            compiler.compile(grammar).result(timeout=20)


@pytest.mark.parametrize("schema", [{"type": 5}, {"items": 5}, {"required": 5}, {"enum": "a"}, {"minLength": -1}])
def test_what_is_no_schema_is_refused_of_every_tool(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    form = read_form(None, [tool_of({"properties": {"a": schema}})], None, parallel_calls=True)
    assert form.grammar is not None
    with pytest.raises(GrammarUnsupported):
        compiler.compile(form.grammar).result(timeout=20)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_response_format_beside_tools_can_be_compiled_alone(compiler: GrammarCompiler, choice: ToolChoice) -> None:
    form = read_form(asked({"not": {}}), TOOLS, choice, parallel_calls=True)
    assert form.content is not None
    with pytest.raises(GrammarUnsupported, match="not"):
        compiler.compile(form.content).result(timeout=20)
    assert form.param == "tools"
    alone = read_form(asked({"not": {}}), None, None, parallel_calls=True)
    assert (alone.grammar, alone.content, alone.param) == (form.content, None, "response_format")


@pytest.mark.parametrize("name", AT_BOUNDS)
def test_schemas_at_the_bounds_can_be_followed(compiler: GrammarCompiler, name: str) -> None:
    form = read_form(asked(AT_BOUNDS[name]), None, None, parallel_calls=True)
    assert form.grammar is not None
    grammar = compiler.compile(form.grammar).result(timeout=60)
    for seed in range(3):
        rng, state = random.Random(seed), grammar.start()
        for _ in range(15):
            state.take(rng.choice(state.allowed(384).nonzero()[0].tolist()))
            assert state.error is None
            if state.is_complete:
                break


def test_json_is_written_as_python_writes_it(compiler: GrammarCompiler) -> None:
    form = form_of("none", response_format="json_object")
    assert takes(compiler, form, json.dumps({"a": 1, "b": [True]}))
    assert not takes(compiler, form, '{"a":1}')
    assert not takes(compiler, form, '{\n"a": 1}')
    assert not takes(compiler, form, "[]")


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"]},
            {"k": "b"},
            {"k": "c"},
        ),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"const": 1}}, [None, 1], [1]),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, {"x1": 2}, {"x1": "2"}),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, {"a": True}, {"a": 1}),
        ({"allOf": [{"minimum": 3}, {"type": "integer", "maximum": 5}]}, 4, 6),
        ({"type": "string", "format": "date"}, "2026-11-27", "27.11.2026"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "a\u20ac", "a"),
        (
            {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
            [[[]]],
            [1],
        ),
    ],
)
def test_schemas_are_followed(compiler: GrammarCompiler, schema: dict[str, Any], right: Any, wrong: Any) -> None:
    form = read_form(asked(schema), None, None, parallel_calls=True)
    assert takes(compiler, form, json.dumps(right, ensure_ascii=False))
    assert not takes(compiler, form, json.dumps(wrong, ensure_ascii=False))
