"""Records, their rendering, their split and their batches."""

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_bases import tiny_tokenizer
from training.data import Example, Record, batches, length_batches, read_records, render, split_records
from training.errors import BadRecord


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("not json", "not JSON"),
        ("[1]", "list"),
        ('{"output": "x"}', "'instruction'"),
        ('{"instruction": "x", "output": "  "}', "'output'"),
        ('{"instruction": "x", "output": "y", "input": 3}', "'input'"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n\n' + line + "\n")
    with pytest.raises(BadRecord, match=r"data\.jsonl:3") as caught:
        read_records(path)
    assert named in str(caught.value)


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


@given(st.lists(st.sampled_from("abcdef"), max_size=40), st.integers(0, 5))
def test_one_prompt_never_lands_on_both_sides(prompts: list[str], seed: int) -> None:
    records = [Record(prompt, f"answer {i}") for i, prompt in enumerate(prompts)]
    train, held = split_records(records, held_out=3, seed=seed)
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert sorted(train + held, key=lambda r: r.output) == sorted(records, key=lambda r: r.output)
    assert (train, held) == split_records(records, held_out=3, seed=seed)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_batches_hold_every_example_once_within_the_limit(lengths: list[int]) -> None:
    examples = [Example(tuple(range(length)), 0) for length in sorted(lengths)]
    grouped = length_batches(examples, max_tokens=60)
    assert [e for batch in grouped for e in batch] == examples
    for batch in grouped:
        assert len(batch) == 1 or len(batch) * max(len(e.token_ids) for e in batch) <= 60


def test_epochs_are_reproducible_and_differ() -> None:
    examples = [Example(tuple(range(i, i + 5)), 0) for i in range(20)]
    first = list(islice(batches(examples, max_tokens=25, seed=3), 8))
    again = list(islice(batches(examples, max_tokens=25, seed=3), 8))
    assert first == again
    assert first[:4] != first[4:]
    assert sorted(e.token_ids for batch in first[:4] for e in batch) == sorted(e.token_ids for e in examples)
