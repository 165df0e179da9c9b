"""Rendering, counting, and what the router gets to read."""

import asyncio

import pytest

from server.errors import ContextTooLong, InvalidRequest
from server.prompts import Prompt, PromptReader, last_user_text
from server.schemas import Message
from tests.servers import byte_tokenizer


def reader(max_model_len: int = 40) -> PromptReader:
    return PromptReader(byte_tokenizer(), max_model_len=max_model_len)


def prompt_of(count: int) -> Prompt:
    return Prompt(tuple(range(count)), "")


@pytest.mark.parametrize(("count", "wanted", "granted"), [(10, None, 30), (10, 30, 30), (39, 1, 1), (40, 0, 0)])
def test_answer_gets_what_is_left_or_what_it_wants(count: int, wanted: int | None, granted: int) -> None:
    assert reader().fit(prompt_of(count), wanted, param="prompt") == granted


@pytest.mark.parametrize(("count", "wanted"), [(40, None), (41, None), (41, 0), (10, 31)])
def test_what_does_not_fit_is_refused(count: int, wanted: int | None) -> None:
    with pytest.raises(ContextTooLong, match="40 tokens"):
        reader().fit(prompt_of(count), wanted, param="prompt")


def test_template_refusal_is_the_clients_fault() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        asyncio.run(PromptReader(tokenizer, max_model_len=40).read_chat([Message(role="user", content="a")]))


def test_base_without_a_template_cannot_chat() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        asyncio.run(PromptReader(tokenizer, max_model_len=40).read_chat([Message(role="user", content="a")]))


def test_long_text_is_tokenized_alike() -> None:
    text = "x" * 20_000
    assert len(asyncio.run(reader().encode(text, add_special_tokens=False))) == 20_000


def test_router_reads_the_last_message_if_no_user_speaks() -> None:
    turns = [Message(role="system", content="a"), Message(role="assistant", content="b")]
    assert last_user_text(turns) == "b"


def test_a_token_that_the_model_lacks_is_refused_also_in_a_text() -> None:
    """Some tokenizers have more tokens than the model has rows."""
    small = PromptReader(byte_tokenizer(), max_model_len=40, vocabulary_size=256)
    with pytest.raises(InvalidRequest, match="the text has '<\\|end\\|>', a token that this base does not have"):
        asyncio.run(small.read_texts(["a<|end|>"]))
    with pytest.raises(InvalidRequest, match="token id 256 is not in the vocabulary of 256"):
        asyncio.run(small.read_texts([[1, 256]]))


def test_ids_beyond_the_context_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ContextTooLong, match="the request has 41 in the prompt"):
        asyncio.run(reader().read_texts([[1] * 41]))


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="100000 is not in the vocabulary"):
        asyncio.run(reader().read_texts([[1, 100_000]]))
