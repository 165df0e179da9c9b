"""The bytes of single tokens, in both kinds of vocabulary."""

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from server.token_text import TokenText
from tests.servers import byte_tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A few tokens as Llama 2 and Gemma write them."""
    vocabulary = {"\u2581the": 0, "re": 1, "<0xE2>": 2, "<0x0A>": 3, "é": 4}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("text", ["hello world", "naïve café", "日本語 🙂", "tab\tand\nline", "\x00\x7f"])
def test_bytes_of_tokens_make_up_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    known = TokenText(tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(known.bytes_of(token_id) for token_id in token_ids) == text.encode()


def test_sentencepiece_spaces_and_bytes_are_known() -> None:
    known = TokenText(sentencepiece_tokenizer())
    assert [known.bytes_of(i) for i in range(5)] == [b" the", b"re", b"\xe2", b"\n", "é".encode()]


def test_added_tokens_are_their_own_text() -> None:
    tokenizer = byte_tokenizer()
    assert TokenText(tokenizer).shown(tokenizer.eos_token_id) == "<|end|>"


def test_half_a_character_is_shown_but_keeps_a_name_of_its_own() -> None:
    known = TokenText(sentencepiece_tokenizer())
    assert known.shown(2) == "\ufffd"
    assert known.key(2) == "bytes:\\xe2"
    assert known.key(0) == " the"


def test_row_that_pads_the_vocabulary_has_no_text() -> None:
    assert TokenText(sentencepiece_tokenizer()).bytes_of(99) == b""
