"""A prompt that is too long loses its end; template and answer stay whole."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_bases import tiny_tokenizer
from training.data.examples import Example, render
from training.data.records import Record
from training.discovery.prompts import label_examples, render_within

TOKENIZER = tiny_tokenizer()
texts = st.text("the lazy dog\n\u00e9\u4e16", min_size=1, max_size=80)


def slow_render_within(record: Record, max_tokens: int) -> tuple[Example, int] | None:
    """Every length tried, from the longest."""
    for kept in range(len(record.prompt), 0, -1):
        example = render(TOKENIZER, Record(record.prompt[:kept], record.output))
        if len(example.token_ids) <= max_tokens:
            return example, kept
    return None


@settings(deadline=None, max_examples=50)
@given(texts, texts, st.integers(10, 80))
def test_what_is_kept_fits_and_no_longer_start_does(prompt: str, answer: str, max_tokens: int) -> None:
    record = Record(prompt, answer)
    fitting, slow = render_within(TOKENIZER, record, max_tokens=max_tokens), slow_render_within(record, max_tokens)
    assert (fitting is None) == (slow is None)
    if fitting is not None and slow is not None:
        assert len(fitting[0].token_ids) <= max_tokens
        # One character more may merge with the last into one token, so that fewer characters need more tokens.
        assert abs(fitting[1] - slow[1]) <= 4


def test_the_answer_and_the_template_stay_whole_and_the_prompts_start() -> None:
    record = Record("jumps over the lazy dog " * 20, "hello world", input="quick brown fox")
    whole = render(TOKENIZER, record)
    fitting = render_within(TOKENIZER, record, max_tokens=60)
    assert fitting is not None
    example, kept = fitting
    assert len(example.token_ids) == 60
    assert example.token_ids[-example.answer_length :] == whole.token_ids[-whole.answer_length :]
    text = TOKENIZER.decode(list(example.token_ids))
    assert str(text).startswith(
        f"<|im_start|>user\n{record.prompt[:kept]}<|im_end|>\n<|im_start|>assistant\nhello world"
    )
    assert 0 < kept < len(record.prompt)


def test_examples_keep_labels_and_order_and_say_what_was_cut_and_left_out() -> None:
    long, hopeless = Record("the lazy dog " * 30, "hello"), Record("hi", "hello world " * 40)
    short = Record("quick brown", "fox")
    data = label_examples(TOKENIZER, {"chat": [short, long], "math": [hopeless, short]}, max_tokens=50)
    assert [(e.label, e.prompt, e.is_cut) for e in data.examples] == [
        ("chat", short.prompt, False),
        ("chat", long.prompt, True),
        ("math", short.prompt, False),
    ]
    assert all(len(labelled.example.token_ids) <= 50 for labelled in data.examples)
    assert data.left_out == {"chat": (), "math": (hashlib.sha256(b"hi").hexdigest(),)}
    assert data.examples[0].example == render(TOKENIZER, short)
    assert data.examples[0].prompt_sha256 == hashlib.sha256(b"quick brown").hexdigest()


@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_counts_every_token(over: int) -> None:
    record = Record("the lazy dog", "hello")
    length = len(render(TOKENIZER, record).token_ids)
    data = label_examples(TOKENIZER, {"chat": [record]}, max_tokens=length - over)
    assert data.examples[0].is_cut == bool(over)
