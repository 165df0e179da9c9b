"""Structured answers and calls of tools with the real base, through the official client."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.documentation import Page
from tests.e2e.server_process import ServerProcess

pytestmark = pytest.mark.e2e

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time", "description": "The time now."}},
]
QUESTION: Any = [{"role": "user", "content": "What will the weather be in Paris tomorrow?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(DEMO_STORE, folder / "store")
    with ServerProcess(folder / "store", folder / "log") as process:
        yield process


class Step(BaseModel):
    what: str = Field(max_length=40)
    result: float = Field(ge=-1000, le=1000, multiple_of=0.5)


class Solution(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=2)
    answer: int = Field(ge=0, le=1000)
    kind: Literal["sum", "product"]
    note: str | None = Field(max_length=20)


def test_parse_gives_a_pydantic_model(server: ServerProcess) -> None:
    answer = server.openai.chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": "Solve 12 + 30 step by step."}],
        response_format=Solution,
        max_completion_tokens=300,
        temperature=0,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Solution)
    assert choice.message.content is not None
    assert Solution.model_validate_json(choice.message.content) == choice.message.parsed


def test_answer_that_is_cut_is_an_error_of_the_clients_parser(server: ServerProcess) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        server.openai.chat.completions.parse(
            model=server.model, messages=QUESTION, response_format=Solution, max_completion_tokens=5
        )


def test_streamed_object_is_whole(server: ServerProcess) -> None:
    with server.openai.chat.completions.stream(
        model=server.model,
        messages=[{"role": "user", "content": "Solve 3 * 4 step by step."}],
        response_format=Solution,
        max_completion_tokens=300,
        seed=3,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Solution)
    assert "".join(deltas) == final.choices[0].message.content
    assert len(deltas) > 10


def test_json_object_is_one(server: ServerProcess) -> None:
    answer = server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Describe a cat as a JSON object with the keys name and age."}],
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0,
    )
    choice = answer.choices[0]
    assert choice.message.content is not None
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":  # a small model may not come to an end
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_call_has_arguments_of_its_schema(server: ServerProcess, choice: Any) -> None:
    answer = server.openai.chat.completions.create(
        model=server.model,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=120,
        temperature=0,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    assert len(message.tool_calls) == 1
    call = message.tool_calls[0]
    assert call.type == "function"
    if not isinstance(choice, str):
        assert call.function.name == "get_weather"
    if call.function.name == "get_weather":
        jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    # What the client sends back is understood.
    again = server.openai.chat.completions.create(
        model=server.model,
        messages=[
            *QUESTION,
            message,  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"},
        ],
        tools=TOOLS,
        max_tokens=10,
    )
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_streamed_arguments_join_to_valid_json(server: ServerProcess) -> None:
    chunks = list(
        server.openai.chat.completions.create(
            model=server.model,
            messages=QUESTION,
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=120,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[-1].finish_reason == "tool_calls"
    parts = [part for choice in choices for part in choice.delta.tool_calls or []]
    first, rest = parts[0], parts[1:]
    assert first.function is not None
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        *(0, "function", "get_weather"),
        "",
    )
    assert first.id is not None
    assert len(rest) > 5
    assert all(part.id is None and part.function is not None and part.function.name is None for part in rest)
    arguments = "".join(part.function.arguments or "" for part in rest if part.function is not None)
    jsonschema.validate(json.loads(arguments), WEATHER)


def test_refusals_are_the_clients_bad_requests(server: ServerProcess) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model=server.model, messages=QUESTION, response_format=wrong)
    assert caught.value.param == "response_format"


def test_examples_of_the_documentation_run(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page("structured_output.md", server.url)
    answered = json.loads(page.run_bash(tmp_path)[0])
    assert set(json.loads(answered["choices"][0]["message"]["content"])) == {"city", "country", "people"}
    page.run_python()["client"].close()
    shown = capsys.readouterr().out
    assert shown.startswith("city=")
    assert "get_weather {'city': " in shown
