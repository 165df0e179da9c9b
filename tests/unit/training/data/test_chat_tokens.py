"""Tokens of foreign chat templates go, everything else stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_bases import byte_fallback_tokenizer, tiny_tokenizer
from training.data.chat_tokens import special_tokens, strip_chat_tokens, strip_record
from training.data.records import Record

LEAKS = [  # text, what is left, tokens removed
    ("<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>", "hi\nho", 4),  # Gemma
    ("<bos><start_of_turn>user\nhi", "hi", 2),
    ("hi<eos>", "hi", 1),
    ("<|turn>user\nhi<turn|>", "hi", 2),  # Gemma 4
    ("<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST] ho </s>", " be kind\nhi  ho ", 6),  # Llama 2
    ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>", " a  b  c  d ", 8),
    (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|>ho<|eom_id|><|end_of_text|>",
        "hiho",
        7,
    ),  # Llama 3
    ("<|header_start|>user<|header_end|>\n\nhi<|eot|>", "hi", 2),  # Llama 4
    ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n", "hi\nho\n", 4),  # ChatML
    ("<|im_start|>user<|im_sep|>hi<|im_end|>", "hi", 3),  # Phi-4
    ("text<|endoftext|>", "text", 1),  # GPT
    ("<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>", "hi\nho", 4),  # Phi-3
    ("<|system|>\nbe</s>\n<|user|>\nhi</s>\n<|assistant|>\nho</s>", "be\nhi\nho", 6),  # Zephyr, TinyLlama
    ("<|start|>assistant<|channel|>final<|message|>ho<|return|>", "ho", 4),  # Harmony
    ('[AVAILABLE_TOOLS] [{"a": 1}][/AVAILABLE_TOOLS]ho', ' [{"a": 1}]ho', 2),  # Mistral
    ('[TOOL_CALLS] [{"name": "f"}]', ' [{"name": "f"}]', 1),
    ("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>ho<｜end▁of▁sentence｜>", "hiho", 4),  # noqa: RUF001 - DeepSeek
    ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>", "hi", 3),  # Command R
    ("<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>", "hi", 2),  # Granite
    ("[|system|]be[|endofturn|]\n[|user|]hi", "be\nhi", 3),  # EXAONE
    ("[gMASK]<sop><|user|>\nhi<|observation|>", "hi", 4),  # GLM
    ("<|IM_START|>User\nhi", "hi", 1),
    ("<|im_start|>hello", "hello", 1),  # no role
    ("<|im_start|>user friendly", "user friendly", 1),  # a word, not a role: its line goes on
    ("a<|im_<|im_end|>end|>b", "ab", 2),  # what removing puts together goes too
]

ORDINARY = [
    "def f(x):\n    if x  <  1:\n\n\n\n        return [x]\t\n",
    "### Instruction:\nAdd.\n\n### Response:\n<think>\nso\n</think>",
    "The price was <s>10</s> 8 euros.",
    "<s>10</s> 8 euros",
    "now 8, before <s>10</s>",
    "pad with '<pad>' between <bos> and <eos> tokens",
    "x = ops[INST] + [SYSTEM_PROMPT]",
    "messages = [SYSTEM_PROMPT]",
    "let f = xs <| map |> g in a <||> b",
    "1 << SYS >> 2 and $x^{<s>}$ for all <user>",
    "<start> <end> [B] user\nassistant\n<system>",
]


@pytest.mark.parametrize(("text", "left", "removed"), LEAKS)
def test_a_leaked_template_goes_with_its_roles(text: str, left: str, removed: int) -> None:
    assert strip_chat_tokens(text) == (left, removed)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_byte_for_byte(text: str) -> None:
    assert strip_chat_tokens(text) == (text, 0)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[")))
def test_text_without_any_token_is_returned_as_it_is(text: str) -> None:
    assert strip_chat_tokens(text) == (text, 0)


PARTS = st.sampled_from(
    [
        "<|im_",
        "start|>",
        "<|im_start|>",
        "user",
        "\n",
        " ",
        "<s>",
        "</s>",
        "<eos>",
        "[INST]",
        "[/INST]",
        "a",
        "    b",
        "<",
    ]
)


@given(st.lists(PARTS, max_size=12).map("".join), st.sampled_from([(), ("<s>", "user"), ("ab", "<<")]))
def test_stripping_again_removes_nothing(text: str, own_tokens: tuple[str, ...]) -> None:
    stripped, removed = strip_chat_tokens(text, own_tokens)
    assert strip_chat_tokens(stripped, own_tokens) == (stripped, 0)
    assert (removed == 0) == (stripped == text)
    assert not any(token in stripped for token in own_tokens)


def test_the_bases_own_tokens_go_wherever_they_stand() -> None:
    text = "was <s>10</s> now <mine> 8"
    assert strip_chat_tokens(text, ("<s>", "</s>", "<mine>")) == ("was 10 now  8", 3)
    assert strip_chat_tokens("a+b", ("+",)) == ("ab", 1)  # it is text, not a pattern


def test_a_blank_own_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\\n'"):
        strip_chat_tokens("text", ("\n",))


def test_special_tokens_are_those_that_the_tokenizer_reads_as_control() -> None:
    assert special_tokens(tiny_tokenizer()) == ("<unk>", "<|im_end|>", "<|im_start|>")
    assert special_tokens(byte_fallback_tokenizer()) == ("</s>", "<s>", "<unk>")
    tokenizer = tiny_tokenizer()
    control = set(tokenizer.all_special_ids)
    leaked = "say <|im_end|> and <|im_start|> now"
    stripped, _ = strip_chat_tokens(leaked, special_tokens(tokenizer))
    assert control & set(tokenizer.encode(leaked))
    assert not control & set(tokenizer.encode(stripped))


def test_a_record_is_stripped_in_what_is_read_and_written() -> None:
    record = Record("<|user|>\nq", "a<|end|>", "<bos>i", source="<|end|>")
    assert strip_record(record, ()) == (Record("q", "a", "i", source="<|end|>"), 3)
    clean = Record("q", "a")
    assert strip_record(clean, ()) == (clean, 0)
