"""The requests of the OpenAI endpoints: names, types and bounds of their fields. Knows no tokens, models or domains.

Unknown fields are tolerated, since clients send many; a known field with a bad value is refused by name, and a known
field that asks for what cannot be done here is refused as unsupported instead of being ignored. Longer than most files
because the API has that many fields.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.types import MAX_LOGPROBS, MAX_STOP_STRINGS
from server.text_fields import Text, said_plainly, without_lone_surrogates
from server.tool_schemas import MAX_TOOLS, ResponseFormat, Tool, ToolCall, ToolChoice

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_PROMPT_IDS = 2**20  # bounds the work on what no context holds
MAX_BIASES = 1024  # every step of the request looks at all of them
MAX_TURNS = 8192  # messages, their parts and calls together; checking them holds up the event loop
MAX_MIX_DOMAINS = 4096
MAX_STOP_CHARACTERS = 1000


def _refuse_unless(*neutral: object) -> BeforeValidator:
    """A field that this server cannot honour: fine while it says nothing, refused when it asks for something."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(one) and value == one for one in neutral):
            return None
        raise PydanticCustomError("unsupported", "is not supported by this server")

    return BeforeValidator(check)


def _at_most(most: int) -> BeforeValidator:
    """Of a dictionary, before each of its values is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "too_long", "must have at most {most} entries, not {count}", {"most": most, "count": len(value)}
            )
        return value

    return BeforeValidator(check)


class TextPart(BaseModel):
    """The one kind of content part that a text model reads."""

    type: Literal["text"]
    text: Text


def _text_parts_only(value: object) -> object:
    for part in value if isinstance(value, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise PydanticCustomError(
                "unsupported",
                "content parts of type {kind} are not supported",
                {"kind": without_lone_surrogates(str(kind))},
            )
    return value


Content = Annotated[
    Text | Annotated[list[TextPart], Field(fail_fast=True)] | None,
    said_plainly("must be a string or a list of text parts"),
    BeforeValidator(_text_parts_only),
]


def _supported_role(value: object) -> object:
    if value == "function":
        raise PydanticCustomError("unsupported", "messages of functions are not supported by this server; use tool")
    return value


class Message(BaseModel):
    """One turn of a chat."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_supported_role)]
    content: Content = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    function_call: Annotated[None, _refuse_unless()] = None

    @property
    def text(self) -> str:
        """The content with its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def _tools_where_they_belong(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid", "tool_calls is only allowed on messages of the assistant")
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("invalid", "tool_call_id is missing on a message of a tool")
        return self


def _count(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


def _few_turns(messages: object) -> object:
    """Counted before any of them is looked at."""
    num_turns = _count(messages)
    if num_turns <= MAX_TURNS and isinstance(messages, list):
        asked = [message for message in messages if isinstance(message, dict)]
        num_turns += sum(_count(one.get("content")) + _count(one.get("tool_calls")) for one in asked)
    if num_turns > MAX_TURNS:
        raise PydanticCustomError(
            "too_long",
            "must have at most {most} messages, content parts and tool calls together, not {count}",
            {"most": MAX_TURNS, "count": num_turns},
        )
    return messages


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_turns)]


class StreamOptions(BaseModel):
    """What a stream carries beside its tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # as vLLM has it: the counts so far on every chunk


class MixRequest(BaseModel):
    """The `brainstacks` extension of a request. A mistyped key is refused: it would change who answers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    mix: Annotated[dict[Text, Annotated[float, Field(ge=0, le=1)]], _at_most(MAX_MIX_DOMAINS)] | None = None
    mode: Literal["auto", "base", "all"] | None = None
    expect: Annotated[list[Text], Field(fail_fast=True)] | None = None  # domains to load while the router still reads

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.mix is not None and self.mode is not None:
            raise PydanticCustomError("invalid", "takes either mix or mode, not both")
        if self.expect is not None and (self.mix is not None or self.mode not in (None, "auto")):
            raise PydanticCustomError("invalid", "takes expect only where the router decides")
        return self


StopString = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None,
    said_plainly(
        f"must be a string or a list of at most {MAX_STOP_STRINGS} strings, of at most {MAX_STOP_CHARACTERS} characters"
    ),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings = None
    ignore_eos: bool | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _at_most(MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    brainstacks: MixRequest | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of the stream carries the counts so far."""
        return self.wants_usage_chunk and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options is only allowed when stream is true")
        if "" in self.stop_strings:
            raise PydanticCustomError("invalid", "stop must not hold an empty string")
        return self


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, _refuse_unless([])] = None
    function_call: Annotated[None, _refuse_unless("none", "auto")] = None
    modalities: Annotated[None, _refuse_unless(["text"], [])] = None
    audio: Annotated[None, _refuse_unless()] = None
    web_search_options: Annotated[None, _refuse_unless()] = None

    @property
    def token_limit(self) -> int | None:
        """By either name; both may be given only with one value."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def may_call_tools(self) -> bool:
        """Whether the answer may hold calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @model_validator(mode="after")
    def _chat_consistent(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("invalid", "max_tokens and max_completion_tokens must not differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid", "top_logprobs needs logprobs to be true")
        called: set[str] = set()
        for message in self.messages:
            called |= {call.id for call in message.tool_calls or []}
            if message.role == "tool" and message.tool_call_id not in called:
                said = "messages: a message of a tool answers {id}, which no tool_calls before it have"
                raise PydanticCustomError("invalid", said, {"id": repr(message.tool_call_id)})
        return self


TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
SeveralPrompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
PromptField = Annotated[
    Text | Annotated[list[Text], SeveralPrompts] | TokenIds | Annotated[list[TokenIds], SeveralPrompts],
    said_plainly(
        "must be a string, a list of strings, a list of token ids, or a list of lists of token ids; "
        f"at most {MAX_PROMPTS} prompts, of at most {MAX_PROMPT_IDS} token ids"
    ),
]


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: PromptField
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[None, _refuse_unless("")] = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> "list[str | list[int]]":
        """One entry a prompt, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # a list whose first entry is an id is one prompt
        return list(self.prompt)

    @model_validator(mode="after")
    def _completion_consistent(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError("unsupported", "best_of other than n is not supported by this server")
        return self


class PromptOrMessages(BaseModel):
    """A request that reads a text without answering it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid", "give either prompt or messages")
        return self


class RouteRequest(PromptOrMessages):
    """POST /v1/route."""


class TokenizeRequest(PromptOrMessages):
    """POST /tokenize."""

    add_generation_prompt: bool = True
    add_special_tokens: bool | None = Field(default=None, description="default: true for a prompt, false for messages")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
