"""Calls of tools and structured answers over HTTP, with a scripted engine: what is asked of it, and what is shown."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import GrammarTooComplex
from engine.grammar import Grammar
from server.schemas import ChatCompletionRequest
from server.tool_format import write_call
from tests.servers import LiveServer, run_live_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
CALLS = "One moment.\n" + write_call("weather", {"city": "Orléans", "days": 2}) + "\n" + write_call("time", {})


def make(tmp_path: Path, answer: str = CALLS) -> AbstractContextManager[LiveServer]:
    return run_live_server(tmp_path, answer=answer, max_model_len=4000)


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with make(tmp_path_factory.mktemp("calling")) as server:
        yield server


def chunks_of(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    lines = server.chat("?", stream=True, **fields).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_whole_answer_has_the_calls_apart_from_the_text(calling: LiveServer) -> None:
    choice = calling.chat("?", tools=[WEATHER, TIME]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "One moment.")
    assert [set(call) for call in message["tool_calls"]] == [{"id", "type", "function"}] * 2
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Orléans", "days": 2}'},
        {"name": "time", "arguments": "{}"},
    ]


def test_stream_begins_each_call_with_its_name_and_goes_on_with_its_arguments(calling: LiveServer) -> None:
    chunks = chunks_of(calling, tools=[WEATHER, TIME], stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": None}
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
    deltas = [choice["delta"] for choice in choices[1:-1]]
    assert all(set(delta) in ({"content"}, {"tool_calls"}) for delta in deltas)
    assert "".join(delta.get("content", "") for delta in deltas) == "One moment."
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert [len(delta["tool_calls"]) for delta in deltas if "tool_calls" in delta] == [1] * len(parts)
    for index, name, arguments in ((0, "weather", '{"city": "Orléans", "days": 2}'), (1, "time", "{}")):
        own = [part for part in parts if part["index"] == index]
        assert set(own[0]) == {"index", "id", "type", "function"}
        assert own[0]["function"] == {"name": name, "arguments": ""}
        assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in own[1:])
        assert "".join(part["function"]["arguments"] for part in own) == arguments
        assert len(own) > len(arguments) / 2  # as it was written, not all at once
    assert [part["index"] for part in parts] == sorted(part["index"] for part in parts)


def test_choices_call_each_for_itself(calling: LiveServer) -> None:
    chunks = chunks_of(calling, tools=[WEATHER, TIME], n=2)
    ids = set()
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        begun = [part for c in own for part in c["delta"].get("tool_calls", []) if "id" in part]
        assert [part["index"] for part in begun] == [0, 1]
        assert own[-1]["finish_reason"] == "tool_calls"
        ids |= {part["id"] for part in begun}
    assert len(ids) == 4


def test_log_probabilities_of_all_tokens_are_told(calling: LiveServer) -> None:
    chunks = chunks_of(calling, tools=[WEATHER, TIME], logprobs=True)
    told = [entry for c in chunks if c["choices"][0]["logprobs"] for entry in c["choices"][0]["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == CALLS


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_is_cut_within_a_call_ends_by_length(calling: LiveServer, stream: bool) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER, TIME],
        "max_tokens": len('One moment.\n<tool_call>\n{"name": "weather"'),
    }
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(calling, **fields)]
        assert not any("tool_calls" in choice["delta"] for choice in choices)
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "One moment."
        assert choices[-1]["finish_reason"] == "length"
        return
    choice = calling.chat("?", **fields).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "One moment.", "refusal": None}
    assert choice["finish_reason"] == "length"


WHOLE = "One moment.\n" + write_call("weather", {"city": "Orléans", "days": 2})


@pytest.mark.parametrize(
    ("answer", "reason", "num_calls"),
    [
        (WHOLE, "tool_calls", 1),
        (WHOLE.removesuffix("</tool_call>"), "tool_calls", 1),  # the stop string of many clients
        (WHOLE[: WHOLE.index("ans")], "stop", 1),
        (WHOLE[: WHOLE.index("days")], "stop", 1),
        (f"{WHOLE}\n{WHOLE[: WHOLE.index('ans')]}".replace("\nOne moment.", ""), "stop", 2),
        (CALLS[: CALLS.index('"time')], "stop", 1),
        (CALLS[: CALLS.index("time")], "stop", 1),
    ],
)
def test_stop_string_that_cuts_a_call_is_no_call(tmp_path: Path, answer: str, reason: str, num_calls: int) -> None:
    with make(tmp_path, answer) as server:
        choice = server.chat("?", tools=[WEATHER, TIME], stop=["ans"]).json()["choices"][0]
        assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == (reason, num_calls)
        assert chunks_of(server, tools=[WEATHER, TIME])[-1]["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_nothing_is_looked_for_in_the_text(calling: LiveServer, fields: dict[str, Any]) -> None:
    choice = calling.chat("?", **fields).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CALLS, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert calling.engine.submitted[-1].sampling.grammar is None
    assert "weather" not in prompt_of(calling)


def test_tools_without_a_call_are_an_ordinary_answer(tmp_path: Path) -> None:
    with make(tmp_path, "It rains. ") as server:
        choice = server.chat("?", tools=[WEATHER]).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "It rains. ", "refusal": None}
        assert choice["finish_reason"] == "stop"
        choices = [chunk["choices"][0] for chunk in chunks_of(server, tools=[WEATHER])]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "It rains. "
        assert choices[-1]["finish_reason"] == "stop"


def prompt_of(server: LiveServer) -> str:
    return server.service.reader.decode(server.engine.submitted[-1].prompt_ids)


def test_model_is_told_of_the_tools_and_of_what_came_of_them(calling: LiveServer) -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "time", "arguments": ""}},
    ]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "When"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "night"}]},
    ]
    assert calling.chat(messages=messages, tools=[TIME]).status_code == 200
    call = write_call("time", {})
    assert prompt_of(calling).startswith("<|system|>Be kind.\n\n# Tools\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "time"}}\n</tools>\n' in prompt_of(calling)
    assert prompt_of(calling).endswith(
        f"<|user|>When?\n<|assistant|>{call}\n{call}\n"
        "<|user|><tool_response>\nnoon\n</tool_response>\n<tool_response>\nnight\n</tool_response>\n<|assistant|>"
    )


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True}}}, True),
        ({"tools": [TIME]}, True),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {"required": ["a"]}}}}]},
            True,
        ),
        ({"tools": [TIME], "tool_choice": "required", "parallel_tool_calls": False}, True),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "time"}}}, True),
    ],
)
def test_engine_gets_a_grammar_where_one_is_asked_for(
    calling: LiveServer, fields: dict[str, Any], has_grammar: bool
) -> None:
    assert calling.chat("?", **fields).status_code == 200
    assert (calling.engine.submitted[-1].sampling.grammar is not None) == has_grammar


def test_choices_share_one_compiled_grammar(calling: LiveServer) -> None:
    for _ in range(2):
        assert calling.chat("?", n=2, response_format={"type": "json_object"}).status_code == 200
    assert len({id(request.sampling.grammar) for request in calling.engine.submitted[-4:]}) == 1


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


def tool(value: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (schema({"type": "strin"}), "response_format", "strin"),
        (schema({"not": {}}), "response_format", "not"),
        (schema({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
        (schema({"$ref": "https://example.com/x"}), "response_format", "example.com"),
        (schema({"type": "string", "pattern": "("}), "response_format", "regex"),
        (schema({"enum": ["x" * 70_000]}), "response_format", "characters"),
        (schema({"multipleOf": 999_983}), "response_format", "multipleOf"),
        (tool({"properties": {"a": {"type": 5}}}), "tools", "type must be a string"),
        (
            {"tools": [{**TIME, "function": {**TIME["function"], "strict": True, "parameters": {"not": {}}}}]},
            "tools",
            "not",
        ),
        (tool({"type": "string"}), "tools", "object"),
        (schema([]), "response_format.json_schema.schema", "dictionary"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [TIME, TIME]}, "tools", "twice"),
        ({"tools": [TIME], **schema({"not": {}})}, "response_format", "not"),
        ({"tools": [TIME], "tool_choice": "required", **schema({"not": {}})}, "response_format", "not"),
        ({"tools": [TIME] * 129}, "tools", "128"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice", "must be none, auto, required"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        (tool({"description": "\ud800"}), "tools", "surrogates"),
        ({"tools": [TIME], "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id is missing"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, None, "'y'"),
        (
            {"messages": [{"role": "user", "tool_calls": [{"type": "function"}]}]},
            "messages.0.tool_calls.0.id",
            "required",
        ),
    ],
)
def test_what_is_wrong_is_named(calling: LiveServer, fields: dict[str, Any], param: str | None, said: str) -> None:
    content = json.dumps({"messages": [{"role": "user", "content": "?"}], **fields})
    with calling.client() as client:
        headers = {"content-type": "application/json"}
        response = client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in error["message"]


@pytest.mark.parametrize("parameters", [{"description": "\ud800"}, {"type": "string"}])
def test_counting_refuses_the_tools_that_a_chat_refuses(calling: LiveServer, parameters: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **tool(parameters)}
    with calling.client() as client:
        response = client.post("/tokenize", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("arguments", ["[1]", '{"city": "Orl', "nothing", "[" * 1500, '{"x": "\\ud800"}'])
def test_arguments_that_are_no_object_are_shown_as_they_came(calling: LiveServer, arguments: str) -> None:
    """An answer that was cut off has such, and a client sends it back."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    response = calling.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 200
    assert write_call("f", arguments) in calling.service.reader.decode(calling.engine.submitted[-1].prompt_ids)


@pytest.mark.parametrize(("depth", "status"), [(64, 200), (65, 400), (956, 400)])
def test_arguments_are_nested_as_deep_as_schemas_may_be(calling: LiveServer, depth: int, status: int) -> None:
    arguments = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    response = calling.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == status
    if status == 400:
        error = response.json()["error"]
        assert error["param"] == "messages.0.tool_calls.0.function.arguments"
        assert "deeper than 64" in error["message"]


def test_nested_bomb_is_refused(calling: LiveServer) -> None:
    bomb = '{"a":' * 500 + "{}" + "}" * 500
    body = (
        '{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"name":"a",'
        f'"schema":{bomb}' + "}}}"
    )
    with calling.client() as client:
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "deeper than 64" in response.json()["error"]["message"]


def test_answer_that_cannot_go_on_in_its_grammar_is_an_error_of_the_request(server: LiveServer) -> None:
    server.engine.fail_with = GrammarTooComplex("the grammar cannot be followed any further: limit")
    response = server.chat("?", response_format={"type": "json_object"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_too_complex"


def test_fields_of_newer_clients_are_tolerated(calling: LiveServer) -> None:
    fields: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "verbosity": "low",
        "prediction": None,
        "prompt_cache_key": "x",
        "safety_identifier": "y",
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "invented": [1],
    }
    answer = calling.chat("?", **fields).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_content_of_every_role_may_come_in_parts(calling: LiveServer, role: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": role, "content": parts, "tool_call_id": "a"},
    ]
    assert calling.chat(messages=messages).status_code == 200
    assert "one two" in prompt_of(calling)


def test_null_is_as_good_as_nothing_for_every_field(calling: LiveServer) -> None:
    fields = set(ChatCompletionRequest.model_fields) - {"messages"}
    assert calling.chat("?", **dict.fromkeys(fields)).status_code == 200


@pytest.mark.parametrize(
    ("is_running", "status", "code"), [(True, 400, "invalid_value"), (False, 429, "grammars_busy")]
)
def test_a_schema_that_takes_too_long_is_refused_but_not_one_that_waits_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool, status: int, code: str
) -> None:
    compiling: Future[Grammar] = Future()
    if is_running:
        compiling.set_running_or_notify_cancel()
    monkeypatch.setattr("server.jobs.COMPILE_SECONDS", 0.05)
    with make(tmp_path) as server:
        monkeypatch.setattr(server.service.grammars, "compile", lambda _: compiling)
        answer = server.chat(response_format={"type": "json_object"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
