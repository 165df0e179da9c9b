"""What the model is shown of tools, calls and results: in its template's own way, or in ours."""

import asyncio
import time
from typing import Any

import pytest

from server.prompts import PromptReader
from server.schemas import Message
from server.tool_format import write_call
from server.tool_schemas import Function
from server.tool_turns import plain_turns, template_knows_tools
from tests.servers import byte_tokenizer

# The parts of Qwen 2.5's template that concern tools.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' }}{{- message.name }}: {{- message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Llama 3's way to write a call, which is not ours.
OTHER = """
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- for message in messages %}
    {%- if message.tool_calls %}{"name": "{{ message.tool_calls[0].function.name }}", "parameters": {}}
    {%- else %}{{- message.role }}: {{ message.content }}{%- endif %}
{%- endfor %}
"""
FIND = Function(name="find", description="Finds it.", parameters={"type": "object", "properties": {}})
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Where?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"x":1}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "here"},
]


def reader_of(template: str | None) -> PromptReader:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return PromptReader(tokenizer, max_model_len=4000)


def render(reader: PromptReader, messages: list[dict[str, Any]], *functions: Function) -> str:
    read = [Message.model_validate(one) for one in messages]
    prompt = asyncio.run(reader.read_chat(read, functions=functions))
    return reader.decode(prompt.token_ids)


@pytest.mark.parametrize(("template", "knows"), [(QWEN, True), (OTHER, False), (None, False), ("{{ x.y.z }}", False)])
def test_template_is_used_if_it_writes_calls_as_we_read_them(template: str | None, knows: bool) -> None:
    assert template_knows_tools(reader_of(template).tokenizer) == knows


def test_template_is_not_used_if_the_mark_of_a_call_is_no_text() -> None:
    tokenizer = reader_of(QWEN).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    assert not template_knows_tools(tokenizer)


def test_template_that_knows_tools_shows_them() -> None:
    shown = render(reader_of(QWEN), MESSAGES, FIND)
    assert shown == (
        "<|im_start|>system\n\n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "find", "description": "Finds it.", '
        '"parameters": {"type": "object", "properties": {}}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWhere?<|im_end|>\n"
        f"<|im_start|>assistant\nI look.\n{write_call('find', {'x': 1})}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nfind:here\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_other_templates_are_told_in_a_system_message() -> None:
    shown = render(reader_of(None), MESSAGES, FIND)
    assert shown.startswith("<|system|># Tools\n\nYou may call one or more functions")
    assert '"description": "Finds it."' in shown
    assert shown.endswith(
        f"<|user|>Where?\n<|assistant|>I look.\n{write_call('find', {'x': 1})}\n"
        "<|user|><tool_response>\nhere\n</tool_response>\n<|assistant|>"
    )


def test_many_results_cost_by_their_number() -> None:
    def seconds(count: int) -> float:
        results = [Message(role="tool", tool_call_id="1", content="x" * 100)] * count
        started = time.thread_time()
        plain_turns(results, ())
        return time.thread_time() - started

    few, many = (min(seconds(count) for _ in range(3)) for count in (2_000, 20_000))
    assert many < 40 * few  # 10 times, and no 100 times


def test_conversation_with_calls_needs_no_tools() -> None:
    shown = render(reader_of(None), MESSAGES)
    assert shown.startswith("<|user|>Where?\n")
    assert "# Tools" not in render(reader_of(QWEN), MESSAGES)


def test_instruction_joins_the_system_message_that_is_there() -> None:
    shown = render(reader_of(None), [{"role": "system", "content": "Be kind."}, *MESSAGES], FIND)
    assert shown.startswith("<|system|>Be kind.\n\n# Tools\n")
    assert shown.count("<|system|>") == 1
