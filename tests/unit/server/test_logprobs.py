"""Log probabilities as JSON."""

import json
import math

from tokenizers.processors import TemplateProcessing

from engine.types import TokenLogprob
from server.logprobs import CompletionLogprobs, chat_logprobs
from server.token_text import TokenText
from tests.servers import byte_tokenizer


def test_impossible_tokens_are_written_as_json_can() -> None:
    text = TokenText(byte_tokenizer())
    token = TokenLogprob(0, -math.inf, ((1, -math.inf),))
    shown = [chat_logprobs([token], text), CompletionLogprobs(text).show([(0, token)])]
    assert "-9999.0" in json.dumps(shown, allow_nan=False)


def test_chosen_token_is_shown_beside_the_likeliest() -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    shown = CompletionLogprobs(TokenText(tokenizer)).show([(b, TokenLogprob(b, -3.0, ((a, -0.1),)))])
    assert shown["top_logprobs"] == [{"a": -0.1, "b": -3.0}]


def test_special_tokens_have_no_place_in_the_text_but_where_it_spells_them_out() -> None:
    tokenizer = byte_tokenizer()
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[end])

    def offsets(prompt: str, answer: str) -> list[int]:
        logprobs = CompletionLogprobs(TokenText(tokenizer), echoed=prompt)
        token_ids = [*tokenizer.encode(prompt), *tokenizer.encode(answer)]
        found: list[int] = logprobs.show([(token_id, None) for token_id in token_ids])["text_offset"]
        return found

    assert offsets("ab", "c") == [0, 0, 1, 2, 2, 2, 3]
    assert offsets("a<|end|>b", "") == [0, 0, 1, 8, 9, 9, 9]


def test_place_in_the_text_goes_on_from_chunk_to_chunk() -> None:
    tokenizer = byte_tokenizer()
    logprobs = CompletionLogprobs(TokenText(tokenizer))
    token_ids = tokenizer.encode("aé!", add_special_tokens=False)
    offsets = [logprobs.show([(token_id, None)])["text_offset"][0] for token_id in token_ids]
    assert offsets == [0, 1, 1, 2]
