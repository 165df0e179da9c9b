"""Streamed text equals the text decoded at once; stop strings never leak."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.types import TokenLogprob
from tests.tiny_bases import byte_fallback_tokenizer, tiny_tokenizer

Streamed = tuple[list[str], list[int], bool]


def stream(text: str, *stop: str, include_stop: bool = False, min_tokens: int = 0) -> Streamed:
    """Feeds a text token by token; returns the pieces shown, the tokens shown, and whether a stop string ended it."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return stream_tokens(tokenizer, [], ids, *stop, include_stop=include_stop, min_tokens=min_tokens)


def stream_tokens(
    tokenizer: Any, prompt: list[int], ids: list[int], *stop: str, include_stop: bool = False, min_tokens: int = 0
) -> Streamed:
    """The same for tokens that follow a prompt."""
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt, stop=stop, include_stop=include_stop, min_tokens=min_tokens)
    pieces, tokens = list[str](), list[int]()
    for token_id in ids:
        event = detokenizer.push(token_id, None)
        if event is not None:
            pieces.append(event.text)
            tokens += event.token_ids
        if detokenizer.stopped:
            return pieces, tokens, True
    event = detokenizer.finish()
    if event is not None:
        pieces.append(event.text)
        tokens += event.token_ids
    return pieces, tokens, False


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_whole_text_and_all_tokens(text: str) -> None:
    tokenizer = tiny_tokenizer()
    pieces, tokens, _ = stream(text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokens == ids


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab€", max_size=30), st.text(alphabet="ab€", min_size=1, max_size=4))
def test_text_ends_before_the_first_stop_string(text: str, stop: str) -> None:
    pieces, _, stopped = stream(text, stop)
    assert stopped == (stop in text)
    assert "".join(pieces) == text.split(stop)[0]


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    pieces, _, _ = stream("a🦙b")
    assert "".join(pieces) == "a🦙b"
    assert not any("\ufffd" in piece for piece in pieces)


def test_of_several_stop_strings_the_one_that_completes_first_ends_the_text() -> None:
    assert "".join(stream("one two three", "three", "two")[0]) == "one "


def test_a_kept_stop_string_is_the_end_of_the_text() -> None:
    assert "".join(stream("one two three", "two", include_stop=True)[0]) == "one two"


def test_the_beginning_of_a_stop_string_is_shown_when_it_does_not_go_on() -> None:
    pieces, _, stopped = stream("xx</s", "</stop>")
    assert "".join(pieces) == "xx</s"
    assert not stopped


def test_logprobs_travel_with_their_tokens() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, prompt_ids=(), stop=(), include_stop=False)
    first = tokenizer.encode("€", add_special_tokens=False)
    events = [detokenizer.push(t, TokenLogprob(t, -1.0, ())) for t in first]
    shown = [event for event in events if event is not None]
    assert [entry.token_id for event in shown for entry in event.logprobs] == first


def test_stop_strings_count_only_beyond_min_tokens() -> None:
    tokenizer = tiny_tokenizer()
    first = len(tokenizer.encode("one two", add_special_tokens=False))
    text = "one two three two four"
    assert "".join(stream(text, "two")[0]) == "one "
    assert "".join(stream(text, "two", min_tokens=first)[0]) == "one two three "


BYTE_FALLBACK = byte_fallback_tokenizer()
NUM_BYTE_FALLBACK_TOKENS = len(BYTE_FALLBACK)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(3, NUM_BYTE_FALLBACK_TOKENS - 1), max_size=12))
def test_any_tokens_of_a_byte_fallback_tokenizer_stream_without_an_error(ids: list[int]) -> None:
    pieces, tokens, _ = stream_tokens(BYTE_FALLBACK, [3 + ord("a")], ids)
    assert tokens == ids
    whole = BYTE_FALLBACK.decode([3 + ord("a"), *ids], skip_special_tokens=True)
    assert "".join(pieces) == whole[1:] or "\ufffd" in whole  # broken characters may be cut differently


def test_bytes_of_a_character_are_shown_when_it_is_complete() -> None:
    llama = [3 + byte for byte in "🦙".encode()]
    assert [p for p in stream_tokens(BYTE_FALLBACK, [], [*llama, 3 + ord("!")])[0] if p] == ["🦙", "!"]


def test_the_space_before_the_first_word_of_an_answer_is_kept() -> None:
    hello, world = (BYTE_FALLBACK.get_vocab()[word] for word in ("▁hello", "▁world"))
    assert "".join(stream_tokens(BYTE_FALLBACK, [hello], [world])[0]) == " world"


def test_an_unfinished_character_of_the_prompt_is_finished_in_the_answer() -> None:
    first, second = (3 + byte for byte in "é".encode())
    hello = BYTE_FALLBACK.get_vocab()["▁hello"]
    assert "".join(stream_tokens(BYTE_FALLBACK, [hello, first], [second, 3 + ord("b")])[0]) == "éb"
