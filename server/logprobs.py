"""Shows log probabilities in the two shapes of OpenAI's API. Knows token texts; not how probabilities are made."""

import codecs
from collections.abc import Sequence
from typing import Any

from engine.types import TokenLogprob
from server.token_text import TokenText

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes an impossible token so


def chat_logprobs(tokens: Sequence[TokenLogprob], text: TokenText) -> dict[str, Any]:
    """`{content: [{token, logprob, bytes, top_logprobs}], refusal}`."""
    return {"content": [_chat_entry(token, text) for token in tokens], "refusal": None}


def _chat_entry(token: TokenLogprob, text: TokenText) -> dict[str, Any]:
    top = [_chat_token(token_id, logprob, text) for token_id, logprob in token.top]
    return _chat_token(token.token_id, token.logprob, text) | {"top_logprobs": top}


def _chat_token(token_id: int, logprob: float, text: TokenText) -> dict[str, Any]:
    return {"token": text.shown(token_id), "logprob": _finite(logprob), "bytes": list(text.bytes_of(token_id))}


class CompletionLogprobs:
    """Shows one choice's tokens with their places in its text. Keeps the place between chunks of a stream.

    `echoed` is the prompt that the text begins with. Special tokens are no text, but where a prompt spells them out.
    """

    def __init__(self, text: TokenText, *, echoed: str = "") -> None:
        self._text = text
        self._echoed = echoed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def show(self, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """(token id, its logprob) -> the four lists of OpenAI's shape; the first token of a prompt has no logprob."""
        offsets = []
        for token_id, _ in tokens:
            offsets.append(self._offset)
            if not self._text.is_special(token_id) or self._echoed.startswith(self._text.shown(token_id), self._offset):
                self._offset += len(self._decoder.decode(self._text.bytes_of(token_id)))
        return {
            "text_offset": offsets,
            "token_logprobs": [None if logprob is None else _finite(logprob.logprob) for _, logprob in tokens],
            "tokens": [self._text.key(token_id) for token_id, _ in tokens],
            "top_logprobs": [None if logprob is None else self._top(logprob) for _, logprob in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the token itself. Of two tokens with one text the likelier is shown."""
        shown: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            key = self._text.key(token_id)
            shown[key] = max(_finite(logprob), shown.get(key, LEAST_LOGPROB))
        return shown


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
