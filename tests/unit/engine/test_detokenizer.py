"""Streamed text equals the text decoded at once; stop strings never leak."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.types import TokenLogprob
from tests.tiny_bases import tiny_tokenizer


def stream(text: str, *stop: str, include_stop: bool = False) -> tuple[list[str], list[int], bool]:
    """Feeds a text token by token; returns the pieces shown, the tokens shown, and whether a stop string ended it."""
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=stop, include_stop=include_stop)
    pieces, tokens = list[str](), list[int]()
    for token_id in tokenizer.encode(text, add_special_tokens=False):
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
    detokenizer = Detokenizer(tokenizer, stop=(), include_stop=False)
    first = tokenizer.encode("€", add_special_tokens=False)
    events = [detokenizer.push(t, TokenLogprob(t, -1.0, ())) for t in first]
    shown = [event for event in events if event is not None]
    assert [entry.token_id for event in shown for entry in event.logprobs] == first
