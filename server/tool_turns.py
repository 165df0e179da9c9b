"""Shows tools, calls and results to the model, by the base's chat template or by our own words. Knows no tokens.

A template is used if it writes calls as tool_format.py does, which a trial call shows: those of Qwen 2.5 and 3, of
Hermes and others do. For every other template, tools are told of in the system message, calls are part of what the
assistant said, and results come as a message of the user.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from server.schemas import Message
from server.tool_format import CALL_MARK, write_call
from server.tool_schemas import Function

Turn = dict[str, Any]

# In the words of Qwen's own template, which many models were trained on.
INSTRUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

TRIAL_ARGUMENTS = {"trial": 1}


def template_knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows tools, and writes a call as we read it."""
    function = Function(name="trial_function", description="trial description")
    call = {"type": "function", "function": {"name": "trial_function", "arguments": TRIAL_ARGUMENTS}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    is_mark_hidden = CALL_MARK in tokenizer.all_special_tokens  # special tokens are no part of an answer's text
    if not tokenizer.chat_template or is_mark_hidden:
        return False
    try:
        shown: str = tokenizer.apply_chat_template(turns, tools=[describe(function)], tokenize=False)
    except (TemplateError, TypeError):  # a template that takes no such turn
        return False
    return "trial description" in shown and write_call("trial_function", TRIAL_ARGUMENTS) in shown


def describe(function: Function) -> dict[str, Any]:
    """A tool as templates know it, and as OpenAI's API has it."""
    fields = function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": fields}


def template_turns(messages: Sequence[Message]) -> list[Turn]:
    """The messages as templates that know tools expect them: arguments as objects, if they are; results named."""
    turns = []
    names: dict[str, str] = {}
    for message in messages:
        turn: Turn = {"role": _template_role(message.role), "content": message.text}
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.values}}
                for c in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        turns.append(turn)
    return turns


def plain_turns(messages: Sequence[Message], functions: Sequence[Function]) -> list[Turn]:
    """The messages for a template that knows only what system, user and assistant say."""
    turns: list[Turn] = []
    for are_results, group in groupby(messages, lambda message: message.role == "tool"):
        if are_results:  # one message: many templates want two to take turns
            results = [f"<tool_response>\n{message.text}\n</tool_response>" for message in group]
            turns.append({"role": "user", "content": "\n".join(results)})
        else:
            turns += [{"role": _template_role(message.role), "content": _said(message)} for message in group]
    return _with_instruction(turns, functions) if functions else turns


def _said(message: Message) -> str:
    calls = [write_call(call.function.name, call.function.values) for call in message.tool_calls or []]
    return "\n".join(part for part in (message.text, *calls) if part)


def _with_instruction(turns: list[Turn], functions: Sequence[Function]) -> list[Turn]:
    signatures = "\n".join(json.dumps(describe(function), ensure_ascii=False) for function in functions)
    instruction = INSTRUCTION.format(signatures=signatures)
    if turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{turns[0]['content']}\n\n{instruction}"}, *turns[1:]]
    return [{"role": "system", "content": instruction}, *turns]


def _template_role(role: str) -> str:
    return "system" if role == "developer" else role  # the new name of the same role; templates know the old one
