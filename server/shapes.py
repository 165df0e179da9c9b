"""Shapes what the engine says as OpenAI's two kinds of answer, whole or in chunks. Knows JSON, not how tokens come.

Both classes are an AnswerShape: `opening`, `prompt`, `tokens` and `finish` make the choices of chunks, `choice` makes
a whole one. Every chunk of a stream has the same id and time.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from engine.types import FinishedEvent, PromptEvent, TokenLogprob, TokensEvent
from server.answers import CollectedChoice, Json
from server.logprobs import CompletionLogprobs, chat_logprobs
from server.token_text import TokenText
from server.tool_deltas import CallDeltas, whole_message


class ChatShape:
    """/v1/chat/completions. With tools, calls are looked for in the answer and shown apart from its text."""

    def __init__(self, *, model: str, wants_logprobs: bool, text: TokenText, has_tools: bool = False) -> None:
        self._envelope = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._wants_logprobs = wants_logprobs
        self._text = text
        self._has_tools = has_tools
        self._calls: dict[int, CallDeltas] = {}

    def envelope(self, *, chunk: bool) -> Json:
        return self._envelope | {"object": "chat.completion.chunk" if chunk else "chat.completion"}

    def opening(self, index: int) -> Json:
        return self._chunk(index, {"role": "assistant", "content": None if self._has_tools else ""})

    def prompt(self, index: int, event: PromptEvent) -> None:
        return None

    def tokens(self, index: int, event: TokensEvent) -> Sequence[Json]:
        logprobs = event.logprobs if self._wants_logprobs else ()
        if self._has_tools:
            deltas = self._calls_of(index).push(event.text)
        else:
            deltas = [{"content": event.text}] if event.text or logprobs else []
        if logprobs and not deltas:  # their text is still held back
            deltas = [{}]
        # All log probabilities of the event are told with its first piece.
        return [self._chunk(index, delta, () if number else logprobs) for number, delta in enumerate(deltas)]

    def finish(self, index: int, event: FinishedEvent) -> Sequence[Json]:
        rest = self._calls_of(index).finish() if self._has_tools else []
        last = self._chunk(index, {}) | {"finish_reason": self._reason(index, event.reason)}
        return [*(self._chunk(index, delta) for delta in rest), last]

    def choice(self, index: int, collected: CollectedChoice) -> Json:
        message: Json = {"role": "assistant", "content": collected.text, "refusal": None}
        if self._has_tools:
            calls = self._calls_of(index)
            message |= whole_message([*calls.push(collected.text), *calls.finish()])
        logprobs = chat_logprobs(collected.logprobs, self._text) if self._wants_logprobs else None
        reason = self._reason(index, collected.finish_reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _calls_of(self, index: int) -> CallDeltas:
        return self._calls.setdefault(index, CallDeltas())

    def _reason(self, index: int, reason: str | None) -> str | None:
        has_called = self._has_tools and self._calls_of(index).are_whole
        return "tool_calls" if reason == "stop" and has_called else reason

    def _chunk(self, index: int, delta: Json, tokens: Sequence[TokenLogprob] = ()) -> Json:
        logprobs = chat_logprobs(tokens, self._text) if self._wants_logprobs and tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """What an echo repeats."""

    text: str
    token_ids: tuple[int, ...]


class CompletionShape:
    """/v1/completions. `echoes` has one entry a choice, or none when nothing is echoed."""

    def __init__(
        self, *, model: str, wants_logprobs: bool, text: TokenText, echoes: Sequence[EchoedPrompt] | None = None
    ) -> None:
        self._envelope = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._wants_logprobs = wants_logprobs
        self._text = text
        self._echoes = echoes
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def envelope(self, *, chunk: bool) -> Json:
        return self._envelope | {"object": "text_completion"}

    def opening(self, index: int) -> None:
        return None

    def prompt(self, index: int, event: PromptEvent) -> Json | None:
        if self._echoes is None:
            return None
        echo = self._echoes[index]
        return self._part(index, echo.text, list(zip(echo.token_ids, event.prompt_logprobs or (), strict=False)))

    def tokens(self, index: int, event: TokensEvent) -> Sequence[Json]:
        if not event.text and not (self._wants_logprobs and event.logprobs):
            return []
        return [self._part(index, event.text, [(logprob.token_id, logprob) for logprob in event.logprobs])]

    def finish(self, index: int, event: FinishedEvent) -> Sequence[Json]:
        return [self._part(index, "", []) | {"finish_reason": event.reason, "logprobs": None}]

    def choice(self, index: int, collected: CollectedChoice) -> Json:
        tokens: list[tuple[int, TokenLogprob | None]] = [(logprob.token_id, logprob) for logprob in collected.logprobs]
        text = collected.text
        if self._echoes is not None:
            echo = self._echoes[index]
            tokens = [*zip(echo.token_ids, collected.prompt_logprobs or (), strict=False), *tokens]
            text = echo.text + text
        return self._part(index, text, tokens) | {"finish_reason": collected.finish_reason}

    def _part(self, index: int, text: str, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> Json:
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._logprobs_of(index).show(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs_of(self, index: int) -> CompletionLogprobs:
        echoed = "" if self._echoes is None else self._echoes[index].text
        return self._logprobs.setdefault(index, CompletionLogprobs(self._text, echoed=echoed))
