"""The tokens that a grammar allows are those, and only those, after which the text can still become one of its texts.

But where the next byte is certain: there the tokens are those that the tokenizer itself would choose.
"""

import copy
import itertools
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.errors import GrammarBusy, GrammarTooComplex, GrammarUnsupported
from engine.grammar import MAX_KEPT, MAX_PENDING, NUM_THREADS, Grammar, GrammarCompiler
from server.token_text import TokenText
from tests.tiny_bases import byte_fallback_tokenizer, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["the", "them", "hello world", "caf\u00e9", None]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["word"],
    "additionalProperties": False,
}
GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LARK = f"start: %json {json.dumps(SCHEMA | {'x-guidance': GUIDANCE})}"
VOCABULARY = 400  # more than either tokenizer has: rows that pad the head


def language() -> list[bytes]:
    """Every text of SCHEMA."""
    flags = [list(flags) for count in range(3) for flags in itertools.product([True, False], repeat=count)]
    words: list[Any] = SCHEMA["properties"]["word"]["enum"]  # type: ignore[index]
    objects = [{"word": word} | rest for word in words for rest in [{}, *({"flags": one} for one in flags)]]
    return [json.dumps(one, ensure_ascii=False).encode() for one in objects]


def compile_now(compiler: GrammarCompiler, text: str) -> Grammar:
    return compiler.compile(text).result(timeout=20)


@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, byte_fallback_tokenizer])
def test_allowed_tokens_are_those_that_leave_the_text_a_beginning_of_some_text(
    make_tokenizer: Callable[[], Any],
) -> None:
    tokenizer, texts = make_tokenizer(), language()
    end = tokenizer.eos_token_id
    spelling = TokenText(tokenizer)
    special = set(tokenizer.all_special_ids)
    pieces = {i: spelling.bytes_of(i) for i in range(len(tokenizer)) if i not in special}
    beginnings = {text[:length] for text in texts for length in range(len(text) + 1)}
    compiler = GrammarCompiler(tokenizer, vocabulary=VOCABULARY, eos_token_ids=frozenset({end}))
    grammar = compile_now(compiler, LARK)
    rng = random.Random(0)
    written = set()
    for _ in range(60):
        state, text = grammar.start(), b""
        while not state.is_complete:
            right = {i for i, piece in pieces.items() if piece and text + piece in beginnings}
            right |= {end} if text in texts else set()
            allowed = state.allowed(VOCABULARY)
            assert allowed.shape == (VOCABULARY,)
            found = set(allowed.nonzero()[0].tolist())
            is_certain = (
                len({beginning[: len(text) + 1] for beginning in beginnings if beginning.startswith(text)}) == 2
            )
            assert found <= right if is_certain and text not in texts else found == right, text
            token = rng.choice(sorted(found))
            state.take(token)
            text += pieces.get(token, b"")
        written.add(text)
    assert written <= set(texts)
    assert len(written) > 10
    compiler.close()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), vocabulary=VOCABULARY, eos_token_ids=frozenset({2}))


def test_answers_of_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler) -> None:
    grammar = compile_now(compiler, 'start: "the" | "fox"')
    t, f = (tiny_tokenizer().get_vocab()[letter] for letter in "tf")
    one, other = grammar.start(), grammar.start()
    one.take(t)
    assert not one.allowed(VOCABULARY)[f]
    assert other.allowed(VOCABULARY)[f]


def test_special_tokens_are_not_text(compiler: GrammarCompiler) -> None:
    state = compile_now(compiler, "start: /(.|\\n)*/").start()
    allowed = state.allowed(VOCABULARY)
    assert [token for token in range(3) if allowed[token]] == [2]  # the end, and no marker of the chat template
    assert allowed[3:90].all()  # ASCII
    assert not allowed[len(tiny_tokenizer()) :].any()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('start: %json {"not": {}}', "not"),
        ('start: %json {"type": "strin"}', "strin"),
        ('start: %json {"type": "integer", "minimum": 3, "maximum": 2}', "minimum"),
        ('start: %json {"$ref": "https://example.com/schema"}', "example.com"),
        ('start: "', "start"),
    ],
)
def test_what_cannot_be_compiled_says_why(compiler: GrammarCompiler, text: str, said: str) -> None:
    with pytest.raises(GrammarUnsupported, match=said):
        compile_now(compiler, text)


LENGTHS = {"anyOf": [{"type": "string", "maxLength": length} for length in range(1, 1500)]}
CHOICES = {
    "allOf": [
        {"anyOf": [{"type": "object", "properties": {f"{name}{number}": {"type": "string"}}} for name in "ab"]}
        for number in range(7)
    ]
}


@pytest.mark.parametrize("schema", [LENGTHS, CHOICES])
def test_what_can_never_be_followed_is_refused_before_an_answer_begins(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    with pytest.raises(GrammarUnsupported, match="cannot be followed"):
        compile_now(compiler, f"start: %json {json.dumps({**schema, 'x-guidance': GUIDANCE})}")


def test_tokenizer_may_have_more_tokens_than_the_model() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == size + 1
    compiler = GrammarCompiler(tokenizer, vocabulary=size, eos_token_ids=frozenset({2}))
    state = compile_now(compiler, LARK).start()
    for _ in range(200):
        if state.is_complete:
            break
        allowed = state.allowed(size)
        assert allowed.shape == (size,)
        state.take(int(allowed.argmax()))
    assert state.is_complete
    assert state.error is None
    compiler.close()


def test_foreign_token_is_an_error_of_that_answer_alone(compiler: GrammarCompiler) -> None:
    grammar = compile_now(compiler, 'start: "the"')
    state = grammar.start()
    state.take(1)
    assert isinstance(state.error, GrammarTooComplex)
    assert not state.is_complete
    assert state.allowed(VOCABULARY).all()
    assert grammar.start().error is None


def test_grammar_is_compiled_once_and_the_latest_are_kept(compiler: GrammarCompiler) -> None:
    first = compiler.compile('start: "first"')
    assert compiler.compile('start: "first"') is first
    for number in range(MAX_KEPT):
        compile_now(compiler, f'start: "{number}"')
    assert compiler.compile('start: "first"') is not first
    broken = compiler.compile('start: "')
    assert broken.exception(timeout=20) is not None
    assert compiler.compile('start: "') is not broken


def test_too_many_at_once_are_refused() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocabulary=VOCABULARY, eos_token_ids=frozenset({2}))
    may_compile = threading.Event()
    for _ in range(NUM_THREADS):
        compiler._threads.submit(may_compile.wait)
    futures = [compiler.compile(f'start: "{number}"') for number in range(MAX_PENDING)]
    with pytest.raises(GrammarBusy, match=str(MAX_PENDING)):
        compiler.compile('start: "one more"')
    may_compile.set()
    assert all(future.result(timeout=20) for future in futures)
    assert compile_now(compiler, 'start: "one more"')
    compiler.close()


def test_tokenizer_of_an_unknown_kind_supports_no_grammars() -> None:
    words = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel({"one": 0, "two": 1, "</s>": 2}, unk_token="one")),
        eos_token="</s>",
    )
    compiler = GrammarCompiler(words, vocabulary=3, eos_token_ids=frozenset({2}))
    with pytest.raises(GrammarUnsupported, match="tokenizer"):
        compile_now(compiler, 'start: "one"')


def test_settings_of_the_tokenizer_stay_as_they_are() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    compiler = GrammarCompiler(tokenizer, vocabulary=VOCABULARY, eos_token_ids=frozenset({2}))
    assert compile_now(compiler, 'start: "the lazy dog"').start().allowed(VOCABULARY).sum() == 1
    truncation = tokenizer.backend_tokenizer.truncation
    assert truncation is not None
    assert truncation["max_length"] == 2
