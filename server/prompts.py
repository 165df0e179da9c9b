"""Turns messages and prompts into token ids and counts them. Knows tokenizer, template and context, no model.

A tokenizer's truncation setting is state that two threads must not share, so this owns its tokenizer.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from server.errors import ContextTooLong, InvalidRequest
from server.schemas import Message
from server.tool_schemas import Function
from server.tool_turns import describe, plain_turns, template_knows_tools, template_turns

# Beyond these, reading would hold up the event loop for milliseconds.
LONG_TEXT_CHARACTERS = 8192
LONG_CHAT_MESSAGES = 64
LONG_TOKENS = 4096
SHRINKAGE = 4  # characters that a template may trim or a tokenizer compose, for each that is left; more than is known


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, and the text that is routed by."""

    token_ids: tuple[int, ...]
    route_text: str
    earlier_text: str | None = None  # what the request before this one in the conversation was routed by


class PromptReader:
    """Renders, tokenizes and measures. Refuses what does not fit; never truncates."""

    def __init__(self, tokenizer: Any, *, max_model_len: int, vocabulary_size: int | None = None) -> None:
        """`vocabulary_size` is the model's, by default the tokenizer's, which may have tokens that the model lacks."""
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._vocabulary_size = min(len(tokenizer), vocabulary_size or len(tokenizer))
        self._max_characters = SHRINKAGE * max_model_len * max(map(len, tokenizer.get_vocab()))
        self._template_knows_tools = template_knows_tools(tokenizer)

    async def read_chat(
        self,
        messages: Sequence[Message],
        *,
        functions: Sequence[Function] = (),
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """The messages in the base's own template, with the functions that may be called; routed by the last user's.

        A template writes its own special tokens, so the tokenizer adds none unless it is told to.
        """
        if len(messages) > self.max_model_len:  # a template writes at least a token for each
            raise self._too_long(f"{len(messages)} messages", param="messages")
        render = partial(self._render, messages, functions, add_generation_prompt=add_generation_prompt)
        is_long = (
            len(messages) > LONG_CHAT_MESSAGES or sum(len(message.text) for message in messages) > LONG_TEXT_CHARACTERS
        )
        rendered = await asyncio.to_thread(render) if is_long else render()
        token_ids = await self.encode(rendered, add_special_tokens=add_special_tokens)
        earlier = user_texts(messages)[:-1]
        return Prompt(token_ids, last_user_text(messages), earlier[-1] if earlier else None)

    async def read_texts(
        self, prompts: Sequence[str | Sequence[int]], *, add_special_tokens: bool = True
    ) -> list[Prompt]:
        """Bare texts or their token ids, without a template; off the event loop when they are long together."""
        read = partial(self._read_texts, prompts, add_special_tokens)
        return await asyncio.to_thread(read) if sum(map(len, prompts)) > LONG_TOKENS else read()

    def check_length(self, num_characters: int, *, param: str) -> None:
        """ContextTooLong for a text that cannot fit, however it is tokenized, which would take seconds."""
        if num_characters > self._max_characters:
            raise self._too_long(f"{num_characters} characters in the {param}", param=param)

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Text -> token ids, off the event loop when it is long."""
        if len(text) > LONG_TEXT_CHARACTERS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Token ids -> text, as it stands. InvalidRequest for an id outside of the vocabulary."""
        self._check_ids(token_ids, param="tokens")
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    async def decode_long(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """As `decode`, off the event loop when there are many."""
        decode = partial(self.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.to_thread(decode) if len(token_ids) > LONG_TOKENS else decode()

    def tokenizer_info(self) -> dict[str, str | int | None]:
        """What a client needs to know of the tokenizer beside its tokens."""
        tokenizer = self.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        template = tokenizer.chat_template
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: getattr(tokenizer, name) for name in names},
            "chat_template": template if isinstance(template, str) else None,
            "max_model_len": self.max_model_len,
        }

    def fit(self, prompt: Prompt, wanted_tokens: int | None, *, param: str) -> int:
        """How many tokens the answer may have: what is wanted, or all that is left.

        ContextTooLong, with the numbers, if prompt and answer do not fit; `param` is the field that holds the prompt.
        """
        count, limit = len(prompt.token_ids), self.max_model_len
        if count == 0:
            raise InvalidRequest(f"{param} has no tokens", param=param)
        answer_tokens = max(1, limit - count) if wanted_tokens is None else wanted_tokens
        if count + answer_tokens > limit:
            asked = "" if wanted_tokens is None else f" and {wanted_tokens} in the completion"
            raise self._too_long(f"{count} in the {param}{asked}", param=param)
        return answer_tokens

    def check_token_id(self, token_id: int, *, param: str) -> None:
        """InvalidRequest for an id outside of the vocabulary."""
        if not 0 <= token_id < self._vocabulary_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary of {self._vocabulary_size}", param=param
            )

    def _too_long(self, what: str, *, param: str) -> ContextTooLong:
        limit = self.max_model_len
        return ContextTooLong(
            f"this model's maximum context length is {limit} tokens, the request has {what}", param=param
        )

    def _check_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        for token_id in {min(token_ids, default=0), max(token_ids, default=0)}:
            self.check_token_id(token_id, param=param)

    def _read_texts(self, prompts: Sequence[str | Sequence[int]], add_special_tokens: bool) -> list[Prompt]:
        return [
            Prompt(self._encode(prompt, add_special_tokens), prompt)
            if isinstance(prompt, str)
            else self._read_ids(prompt)
            for prompt in prompts
        ]

    def _read_ids(self, prompt: Sequence[int]) -> Prompt:
        self._check_ids(prompt, param="prompt")
        if len(prompt) > self.max_model_len:
            raise self._too_long(f"{len(prompt)} in the prompt", param="prompt")
        return Prompt(tuple(prompt), self.decode(prompt, skip_special_tokens=True))

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        if (foreign := max(token_ids, default=0)) >= self._vocabulary_size:
            token = self.tokenizer.convert_ids_to_tokens(foreign)
            raise InvalidRequest(f"the text has {token!r}, a token that this base does not have")
        return tuple(token_ids)

    def _render(
        self, messages: Sequence[Message], functions: Sequence[Function], *, add_generation_prompt: bool
    ) -> str:
        if not self.tokenizer.chat_template:
            raise InvalidRequest("this base has no chat template; use /v1/completions", param="messages")
        knows_tools = self._template_knows_tools
        turns = template_turns(messages) if knows_tools else plain_turns(messages, functions)
        tools = [describe(function) for function in functions] if knows_tools and functions else None
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the base's chat template refuses these messages: {error}", param="messages"
            ) from error
        return rendered


def user_texts(messages: Sequence[Message]) -> list[str]:
    """What the user said, in order."""
    return [message.text for message in messages if message.role == "user"]


def last_user_text(messages: Sequence[Message]) -> str:
    """What the router reads: the last user message, or the last message if no user speaks."""
    return (user_texts(messages) or [messages[-1].text])[-1]
