"""The fields that ask for a form of the answer, and that tell of calls of tools. Knows names and bounds, no grammar.

What a JSON schema says inside is checked where it is compiled.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.schema_bounds import MAX_DEPTH, is_deeper
from server.text_fields import Text, said_plainly, without_lone_surrogates

MAX_TOOLS = 128

# As in OpenAI's reference.
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


class OfFunction(BaseModel):
    """Something of the one kind of tool that is known; of another kind, it is refused as such."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_function(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            shown = without_lone_surrogates(kind)
            raise PydanticCustomError("unsupported", "tools of type {kind} are not supported", {"kind": shown})
        return value


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. The answer keeps to the schema whether `strict` is set or not."""

    model_config = ConfigDict(strict=True)

    name: Name
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer's text has to be: anything, a JSON object, or what a schema describes."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("invalid", "json_schema is missing")
        return self


class Function(BaseModel):
    """A function that the model may call. Without parameters it takes none."""

    model_config = ConfigDict(strict=True)

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(OfFunction):
    """What the model may use."""

    function: Function


class NamedFunction(BaseModel):
    """Which function."""

    name: Name


class NamedChoice(OfFunction):
    """The model has to call this function."""

    function: NamedFunction


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedChoice,
    said_plainly("must be none, auto, required, or name a function as {type: function, function: {name: ...}}"),
]


def _read_arguments(text: str) -> dict[str, Any] | str:
    """The object that a text says, or the text where it says none, as that of a call that was cut off.

    A call without arguments may be an empty text.
    """
    try:
        arguments = json.loads(text or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()  # escapes can say half a surrogate pair
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _not_too_deep(text: str) -> str:
    if is_deeper(_read_arguments(text), MAX_DEPTH):
        raise PydanticCustomError("invalid", f"must not be nested deeper than {MAX_DEPTH} levels")
    return text


class CalledFunction(BaseModel):
    """The function of a call, and its arguments as the model wrote them: clients send back what they were given."""

    model_config = ConfigDict(strict=True)

    name: Name
    arguments: Annotated[Text, AfterValidator(_not_too_deep)]

    @property
    def values(self) -> dict[str, Any] | str:
        """The arguments, read; as they were written where they are no JSON object."""
        return _read_arguments(self.arguments)


class ToolCall(OfFunction):
    """A call that the assistant made earlier in the conversation."""

    id: Text
    function: CalledFunction
