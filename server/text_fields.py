"""What fields of requests have in common: texts that are text, refusals in one sentence. Knows pydantic only."""

from typing import Annotated

from pydantic import AfterValidator, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError


def said_plainly(message: str) -> WrapValidator:
    """One sentence in place of a report on every member of a union."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            unsupported = [fault for fault in faults if fault["type"] == "unsupported"]
            kind = "unsupported" if unsupported else "invalid"
            raise PydanticCustomError(
                kind, "{said}", {"said": unsupported[0]["msg"] if unsupported else message}
            ) from None

    return WrapValidator(check)


def without_lone_surrogates(text: str) -> str:
    """For a client's own words in a message: half a surrogate pair in them could not be sent back."""
    return text.encode(errors="replace").decode()


def _encodable(value: str) -> str:
    """JSON can say half a surrogate pair, which is no text and which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("invalid", "must be valid unicode text, without lone surrogates") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
