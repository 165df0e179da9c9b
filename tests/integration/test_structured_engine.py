"""A random model under a grammar writes what the grammar says, and nobody beside it notices."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.engine import Engine
from engine.errors import GrammarTooComplex
from engine.grammar import Grammar, GrammarCompiler
from engine.model.base import load_base
from engine.types import SamplingParams
from server.answer_grammar import read_form
from server.tool_schemas import ResponseFormat
from tests.engines import Client, Collected, collect

ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 1, "maximum": 500},
        "price": {"type": ["number", "null"], "multipleOf": 0.5, "minimum": -100, "maximum": 100},
        "kind": {"enum": ["pizza", "p\u00e2t\u00e9"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-f]{1,4}$"}, "maxItems": 3},
        "of": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/part"}]},
    },
    "required": ["name", "count", "kind", "tags", "of"],
    "additionalProperties": False,
    "$defs": {
        "part": {"type": "object", "properties": {"x": {"const": 7}}, "required": ["x"], "additionalProperties": False}
    },
}
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 30, "maxItems": 30}
PROMPTS = [list(range(5, 5 + n)) for n in (3, 17, 40, 9)]
MAX_TOKENS = 300


@contextmanager
def running_engine(folder: Path, **options: int) -> Iterator[Client]:
    base = load_base(str(folder), base_format="dense", dtype="float32")
    settings = {"max_model_len": 400, "kv_cache_tokens": 4000, **options}
    engine = Engine(base, max_batch_rows=8, fused_step=True, **settings)
    engine.start()
    try:
        yield Client(engine)
    finally:
        engine.stop()


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """What is submitted in the block starts in one step."""
    gate = threading.Event()
    engine.run_on_device(lambda: gate.wait(60))
    yield
    gate.set()


class Grammars:
    """Grammars for a client's base."""

    def __init__(self, client: Client) -> None:
        base = client.engine.base
        self._compiler = GrammarCompiler(
            base.tokenizer, vocabulary=base.text_config.vocab_size, eos_token_ids=base.eos_token_ids
        )

    def lark(self, text: str) -> Grammar:
        return self._compiler.compile(text).result(timeout=30)

    def of(self, schema: dict[str, Any]) -> Grammar:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        form = read_form(ResponseFormat.model_validate(wanted), None, None, parallel_calls=True)
        assert form.grammar is not None
        return self.lark(form.grammar)


@pytest.fixture(scope="module")
def client(tiny_base_folder: Callable[[str], Path]) -> Iterator[Client]:
    with running_engine(tiny_base_folder("llama")) as client:
        yield client


@pytest.fixture(scope="module")
def grammars(client: Client) -> Grammars:
    return Grammars(client)


def sampled(grammar: Grammar | None = None, **options: Any) -> SamplingParams:
    settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "seed": 0, "grammar": grammar, **options}
    return SamplingParams(**settings)


def reason_of(answer: Collected) -> str:
    assert answer.finished is not None, answer.error
    return answer.finished.reason


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        *({"seed": seed} for seed in range(8)),
        {"temperature": 2.0, "top_p": 0.9, "seed": 3},
        {"temperature": 1.5, "top_k": 3, "seed": 4},
        {"repetition_penalty": 1.7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"ignore_eos": True},
        {"min_tokens": 250},
        {"logit_bias": dict.fromkeys(range(3, 60), -100.0)},  # the tokens that JSON is made of
    ],
)
def test_random_model_answers_with_an_instance_of_the_schema(
    client: Client, grammars: Grammars, options: dict[str, Any]
) -> None:
    answer = client.run(PROMPTS[0], sampled(grammars.of(ORDER), **options))
    jsonschema.validate(json.loads(answer.text), ORDER)
    assert reason_of(answer) == "stop"
    assert answer.finished is not None
    assert answer.finished.completion_tokens == len(answer.token_ids)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3"])
def test_other_bases_answer_so_too(architecture: str, tiny_base_folder: Callable[[str], Path]) -> None:
    with running_engine(tiny_base_folder(architecture)) as client:
        answer = client.run(PROMPTS[0], sampled(Grammars(client).of(ORDER)))
    jsonschema.validate(json.loads(answer.text), ORDER)


def test_nobody_in_a_mixed_batch_answers_otherwise_than_alone(client: Client, grammars: Grammars) -> None:
    order, numbers = grammars.of(ORDER), grammars.of(NUMBERS)
    wishes = [
        sampled(order),
        sampled(max_tokens=60),
        sampled(numbers, temperature=0.0),
        sampled(max_tokens=60, temperature=0.0, logprobs=2),
    ]
    with held(client.engine):
        pending = [client.submit(prompt, wish)[1] for prompt, wish in zip(PROMPTS, wishes, strict=True)]
    together = [collect(events) for events in pending]
    alone = [client.run(prompt, wish) for prompt, wish in zip(PROMPTS, wishes, strict=True)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert together[3].logprobs == alone[3].logprobs
    jsonschema.validate(json.loads(together[0].text), ORDER)
    jsonschema.validate(json.loads(together[2].text), NUMBERS)


def test_choices_with_seeds_apart_differ_and_each_is_the_same_again(client: Client, grammars: Grammars) -> None:
    grammar = grammars.of(ORDER)

    def ask() -> list[str]:
        with held(client.engine):
            pending = [client.submit(PROMPTS[1], sampled(grammar, seed=seed))[1] for seed in range(4)]
        return [collect(events).text for events in pending]

    texts = ask()
    assert len(set(texts)) == 4
    assert ask() == texts


def test_those_that_gave_way_go_on_inside_their_grammar(tiny_base_folder: Callable[[str], Path]) -> None:
    answers = []
    for tokens in (4000, 208):
        with running_engine(tiny_base_folder("llama"), max_model_len=200, kv_cache_tokens=tokens) as client:
            grammar = Grammars(client).of(NUMBERS)
            with held(client.engine):
                wishes = [sampled(grammar, max_tokens=140, seed=seed) for seed in range(4)]
                pending = [client.submit(prompt, wish)[1] for prompt, wish in zip(PROMPTS, wishes, strict=True)]
            answers.append([collect(events) for events in pending])
            client.engine.run_on_device(lambda: None).result(timeout=60)
            assert (client.engine.snapshot().preempted > 0) == (tokens == 208)
    assert [answer.token_ids for answer in answers[0]] == [answer.token_ids for answer in answers[1]]
    for answer in answers[1]:
        jsonschema.validate(json.loads(answer.text), NUMBERS)


def test_cut_answer_ends_by_length_and_a_complete_one_does_not(client: Client, grammars: Grammars) -> None:
    grammar = grammars.of(NUMBERS)
    whole = client.run(PROMPTS[0], sampled(grammar))
    needed = len(whole.token_ids)
    assert reason_of(client.run(PROMPTS[0], sampled(grammar, max_tokens=needed))) == "stop"
    cut = client.run(PROMPTS[0], sampled(grammar, max_tokens=needed - 1))
    assert reason_of(cut) == "length"
    assert whole.text.startswith(cut.text)


def test_text_that_could_go_on_ends_by_its_end_token(client: Client, grammars: Grammars) -> None:
    grammar = grammars.of({"type": "integer", "minimum": 0})
    end = next(iter(client.engine.base.eos_token_ids))
    short = client.run(PROMPTS[0], sampled(grammar, logit_bias={end: 100.0}))
    assert short.token_ids[-1] == end
    assert len(short.text) == 1
    longer = client.run(PROMPTS[0], sampled(grammar, logit_bias={end: 100.0}, min_tokens=9))
    assert longer.text.isdecimal()
    assert len(longer.token_ids) == 10  # nine that are not the end, then the end
    assert reason_of(client.run(PROMPTS[0], sampled(grammar, ignore_eos=True, logit_bias={end: 100.0}))) == "stop"


def test_stop_strings_cut_a_grammar_too(client: Client, grammars: Grammars) -> None:
    answer = client.run(PROMPTS[0], sampled(grammars.of(NUMBERS), stop=(", ",)))
    assert answer.text.startswith("[")
    assert answer.text[1:].isdecimal()
    assert reason_of(answer) == "stop"


def test_logprobs_are_the_models_own(client: Client, grammars: Grammars) -> None:
    free = client.run(PROMPTS[0], sampled(max_tokens=1, logprobs=3, temperature=0.0))
    bound = client.run(PROMPTS[0], sampled(grammars.of(NUMBERS), max_tokens=1, logprobs=3, temperature=0.0))
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.logprobs[0].token_id != free.logprobs[0].token_id


def test_cancelled_answer_ends_and_leaves_the_grammar_to_others(client: Client, grammars: Grammars) -> None:
    endless = grammars.lark('start: ("ab")*')
    end = next(iter(client.engine.base.eos_token_ids))
    request_id, events = client.submit(PROMPTS[0], sampled(endless, logit_bias={end: -100.0}))
    events.get(timeout=60)
    client.engine.cancel(request_id)
    assert reason_of(collect(events)) == "cancelled"
    assert client.run(PROMPTS[0], sampled(endless, max_tokens=4)).text.startswith("ab")


def test_answer_that_leaves_its_grammar_fails_alone(
    client: Client, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = grammars.lark('start: "the"')
    states = [broken.start()]
    states[0].take(0)  # no token of the text: from here on it cannot be followed
    monkeypatch.setattr(broken, "start", lambda: states[0])
    beside = sampled(max_tokens=20)
    with held(client.engine):
        failing = client.submit(PROMPTS[0], sampled(broken))[1]
        going = client.submit(PROMPTS[1], beside)[1]
    assert isinstance(collect(failing).error, GrammarTooComplex)
    assert collect(going).token_ids == client.run(PROMPTS[1], replace(beside)).token_ids
