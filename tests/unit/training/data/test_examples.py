"""Rendering a record, and the two sides of a domain."""

import pytest

from tests.tiny_bases import tiny_tokenizer
from training.data.examples import render, render_domain
from training.data.records import DomainRecords, Record
from training.errors import BadRecord, DataUnusable


def test_rendering_is_the_chat_template_and_loss_starts_at_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    example = render(tokenizer, Record("add", "    return 1", "x = 1"))
    prompt = tokenizer.decode(list(example.token_ids[: example.prompt_length]))
    answer = tokenizer.decode(list(example.token_ids[example.prompt_length :]))
    assert prompt == "<|im_start|>user\nadd\n\nx = 1<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "    return 1<|im_end|>"  # indentation kept, the end token learned, nothing after it


def test_prompt_tokens_are_those_that_serving_gives() -> None:
    tokenizer = tiny_tokenizer()
    example = render(tokenizer, Record("hello", "world"))
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert list(example.token_ids[: example.prompt_length]) == served


class TwoFaced:
    """A tokenizer whose template writes the prompt otherwise once there is an answer."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        return f"{len(messages)}: {messages[0]['content']}"


def test_a_template_that_renders_an_answer_otherwise_is_refused() -> None:
    with pytest.raises(BadRecord, match="differently"):
        render(TwoFaced(), Record("hello", "world"))


def test_a_record_that_is_too_long_is_left_out_and_counted_never_cut() -> None:
    tokenizer = tiny_tokenizer()
    short, long = Record("hello", "world"), Record("hello", "world " * 100)
    limit = len(render(tokenizer, short).token_ids)
    rendered = render_domain(tokenizer, DomainRecords("greet", [short, long], [short]), max_tokens=limit)
    assert rendered.train == rendered.held_out == [render(tokenizer, short)]
    assert rendered.too_long == 1


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_a_side_with_nothing_left_names_the_domain_and_the_limit(side: str) -> None:
    records = {"train": [Record("a", "b")], "held_out": [Record("a", "b")], side: [Record("a", "b" * 1000)]}
    with pytest.raises(DataUnusable, match=r"'greet'.*none of 1 records has at most 50 tokens"):
        render_domain(tiny_tokenizer(), DomainRecords("greet", records["train"], records["held_out"]), max_tokens=50)
