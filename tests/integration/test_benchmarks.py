"""Benchmarks on a tiny base: the harness's requests scored right under every mix, and the same numbers over HTTP."""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="benchmarks need the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

from engine.model.base import Base, load_base
from engine.model.inject import injected
from engine.model.moe_lora import ServingDeltas
from router.policy import RoutingPolicy
from server.compose import compose_app_for
from server.config import load_settings
from tests.benchmarks.harness_parity import compare, served_model
from tests.evaluation_stores import make_evaluation_store
from tests.servers import serve_app
from tests.tiny_bases import make_llama
from training.context import pack_of
from training.errors import EvaluationInvalid
from training.evaluating.benchmarking import Benchmarks
from training.evaluating.finished import Finished
from training.evaluating.generation import GreedyTexts
from training.evaluating.harness import Benchmark, Harness, run_benchmark, score
from training.evaluating.language_model import MixedLM
from training.evaluating.mixes import Mixes
from training.evaluating.plan import Plan
from training.evaluating.scoring import RowScores
from training.evaluating.subject import Mix, Subject, open_subject

SAMPLES = Path(__file__).parents[1] / "data" / "benchmarks"
DOMAINS = ("chat", "code", "math", "medical", "reasoning")
MIXES: list[Mix] = [{}, {"math": 1.0}, {"chat": 0.2, "math": 0.7}, dict.fromkeys(DOMAINS, 1.0)]
PAIRS = [
    ("the quick brown", " fox"),
    ("hello", " world says the dog"),
    ("a trailing space ", "moves"),
    ("", "nothing stands before"),
    ("over the lazy", " d"),
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("base") / "tiny-long", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return load_base(str(base_folder), base_format="dense", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_evaluation_store(tmp_path_factory.mktemp("store"), base, DOMAINS)


@pytest.fixture(scope="module")
def subject(base: Base, store: Path) -> Subject:
    return open_subject(base, store, RoutingPolicy())


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Finished]:
    with Finished(tmp_path / "finished.sqlite") as opened:
        yield opened


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=0, metadata=("task", index, 1))
        for index, argument in enumerate(arguments)
    ]


def model_of(subject: Subject, finished: Finished, mixes: Sequence[Mix] | None = None, max_tokens: int = 64) -> MixedLM:
    """The mixes go round among the requests."""
    chosen = mixes or [{}]
    return MixedLM(
        subject,
        lambda requests: [chosen[index % len(chosen)] for index in range(len(requests))],
        finished=finished,
        max_tokens=max_tokens,
    )


def logits_of(subject: Subject, token_ids: Sequence[int], mix: Mix) -> torch.Tensor:
    """(L, V): one text, one pass of transformers' own model, with the deltas of one mix."""
    deltas = ServingDeltas()
    names = [name for name in subject.stacks if mix.get(name)]
    if (pack := pack_of(names, subject.stacks)) is not None:
        weights = [mix[name] for name in names for _ in subject.stacks[name]]
        deltas.current = pack.step(torch.tensor([weights] * len(token_ids)))
    with torch.no_grad(), injected(subject.base.sites, deltas):
        logits: torch.Tensor = subject.base.model(input_ids=torch.tensor([list(token_ids)])).logits[0]
    return logits


def slow_score(subject: Subject, context: str, continuation: str, mix: Mix) -> tuple[float, bool]:
    """Every token of the continuation, one after the other."""
    encode = subject.base.tokenizer.encode
    stripped = context.rstrip()
    before = encode(stripped) or [subject.base.tokenizer.bos_token_id]
    whole = encode(context + continuation)
    tokens = list(before) + (whole if not stripped else whole[len(before) :])
    logits = logits_of(subject, tokens, mix)
    total, greedy = 0.0, True
    for place in range(len(before), len(tokens)):
        total += float(logits[place - 1].double().log_softmax(-1)[tokens[place]])
        greedy = greedy and int(logits[place - 1].argmax()) == tokens[place]
    return total, greedy


@pytest.mark.parametrize("max_tokens", [1, 40, 5000])
def test_log_likelihoods_count_every_token_under_each_requests_own_mix(
    subject: Subject, finished: Finished, max_tokens: int
) -> None:
    pairs = [pair for pair in PAIRS for _ in MIXES]
    scores = model_of(subject, finished, MIXES, max_tokens).loglikelihood(instances("loglikelihood", pairs))
    for index, (pair, (value, greedy)) in enumerate(zip(pairs, scores, strict=True)):
        expected, expected_greedy = slow_score(subject, *pair, MIXES[index % len(MIXES)])
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert len({round(value, 3) for value, _ in scores[: len(MIXES)]}) == len(MIXES)  # the mixes matter


def test_a_continuation_of_one_token_is_scored(subject: Subject, finished: Finished) -> None:
    """The paper's code began behind the first token of every continuation."""
    one = subject.base.tokenizer.encode("the quick!")[-1:]
    assert len(one) == 1
    ((value, _),) = model_of(subject, finished).loglikelihood(instances("loglikelihood", [("the quick", "!")]))
    assert value < -0.1


def test_what_greedy_decoding_says_is_greedy(subject: Subject, finished: Finished) -> None:
    model = model_of(subject, finished, [{"math": 1.0}])
    settings = {"until": [], "max_gen_toks": 5}
    (said,) = model.generate_until(instances("generate_until", [("hello", settings)]))
    prompt = subject.base.tokenizer.encode("hello")
    rest = subject.base.tokenizer.encode(f"hello{said}")[len(prompt) :]
    tokens = greedy_tokens(subject, prompt, {"math": 1.0}, 5)
    if rest == tokens:  # the text is tokenised again as it was made
        assert model.loglikelihood(instances("loglikelihood", [("hello", said)]))[0][1]
    other = model.loglikelihood(instances("loglikelihood", [("hello", " zebra")]))
    assert not other[0][1]


def greedy_tokens(subject: Subject, prompt: Sequence[int], mix: Mix, count: int) -> list[int]:
    """One token at a time, the whole text anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(logits_of(subject, tokens, mix)[-1].argmax())
        if token in subject.base.eos_token_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_texts_are_greedy_under_each_requests_own_mix(subject: Subject, finished: Finished) -> None:
    prompts = ["hello", "the quick brown fox", "dog", "over the lazy dog says"]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    requests = [(prompt, settings) for prompt in prompts for _ in MIXES]
    texts = model_of(subject, finished, MIXES).generate_until(instances("generate_until", requests))
    for index, (prompt, _) in enumerate(requests):
        ids = subject.base.tokenizer.encode(prompt)
        expected = greedy_tokens(subject, ids, MIXES[index % len(MIXES)], 12)
        assert texts[index] == subject.base.tokenizer.decode(expected, skip_special_tokens=True)


def test_texts_end_before_the_first_stop_string(subject: Subject, finished: Finished) -> None:
    model = model_of(subject, finished)
    (whole,) = model.generate_until(instances("generate_until", [("hello", {"until": [], "max_gen_toks": 20})]))
    stops = [whole[9:11], whole[4:6]]
    first = min(whole.index(stop) for stop in stops)
    cut = model.generate_until(instances("generate_until", [("hello", {"until": stops, "max_gen_toks": 20})] * 2))
    assert cut == [whole[:first]] * 2


def test_a_long_text_is_scored_in_windows_each_token_once(subject: Subject, finished: Finished) -> None:
    short = replace(subject, base=replace(subject.base, max_positions=16))
    text = "hello world says the lazy dog " * 6
    (value,) = model_of(short, finished).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    tokens = [subject.base.tokenizer.bos_token_id, *subject.base.tokenizer.encode(text)]
    expected, size = 0.0, 15  # one position less than the context, as the harness has it
    for start in range(1, len(tokens), size):
        part = tokens[start : start + size]
        # A window is filled up with what stands before it.
        shown = tokens[max(0, start + len(part) - size - 1) : start + len(part)]
        log_probabilities = logits_of(subject, shown, {}).log_softmax(-1)
        for place in range(len(shown) - len(part), len(shown)):
            expected += float(log_probabilities[place - 1][shown[place]])
    assert value == pytest.approx(expected, abs=1e-3)


def test_what_does_not_fit_or_cannot_be_done_is_refused(subject: Subject, finished: Finished) -> None:
    model = model_of(subject, finished)
    long = "hello " * 5000
    with pytest.raises(EvaluationInvalid, match="do not fit the base's context of 4096"):
        model.loglikelihood(instances("loglikelihood", [(long, " x")]))
    with pytest.raises(EvaluationInvalid, match="do not fit the base's context of 4096"):
        model.generate_until(instances("generate_until", [("x", {"until": [], "max_gen_toks": 4096})]))
    with pytest.raises(EvaluationInvalid, match="nothing to score"):
        model.loglikelihood(instances("loglikelihood", [("x", "")]))
    for settings, fault in (({"do_sample": True}, "do_sample=True"), ({"num_beams": 4}, "num_beams=4")):
        with pytest.raises(EvaluationInvalid, match=fault):
            model.generate_until(instances("generate_until", [("x", settings)]))


def test_finished_requests_are_not_run_again(
    subject: Subject, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    pairs, settings = PAIRS * 2, {"until": ["\n"], "max_gen_toks": 4}
    requests = instances("loglikelihood", pairs), instances("generate_until", [("hello", settings)])
    first = model_of(subject, finished, MIXES)
    scores, texts = first.loglikelihood(requests[0]), first.generate_until(requests[1])
    again = model_of(subject, finished, MIXES)
    monkeypatch.setattr(RowScores, "scores", fail)
    monkeypatch.setattr(GreedyTexts, "texts", fail)
    assert (again.loglikelihood(requests[0]), again.generate_until(requests[1])) == (scores, texts)
    changed = replace(subject, digests={**subject.digests, "math": ("0" * 64,)})
    other = model_of(changed, finished, [{"math": 1.0}])
    with pytest.raises(AssertionError, match="measured again"):
        other.loglikelihood(instances("loglikelihood", [PAIRS[0]]))


def load(name: str, limit: int | None = None) -> Benchmark:
    return Harness().load([name], SAMPLES, limit=limit, seed=42)[0]


def test_every_task_runs_on_its_sample_without_a_network(
    subject: Subject, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the harness reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plan = Plan(modes=("base", "label", "ungated", "routed"), data=SAMPLES, limit=1, run_code=True)
    benchmarks = Benchmarks(plan, SAMPLES, seed=42)
    short_texts(benchmarks._benchmarks)
    reports = benchmarks.measure(subject, finished, max_tokens=2048)
    assert set(reports) == set(Harness().names)
    assert len(reports) == 12
    for name, report in reports.items():
        assert report.documents == 1, name
        assert report.domain in DOMAINS
        for metric in report.metrics.values():
            assert set(metric.values) == set(plan.modes)
            assert [comparison.other for comparison in metric.comparisons] == ["base", "ungated", "label"]
    assert set(reports["gsm8k"].metrics) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert set(reports["hellaswag"].metrics) == {"acc", "acc_norm"}
    assert set(reports["humaneval"].metrics) == {"pass@1"}


def short_texts(benchmarks: Sequence[Benchmark]) -> None:
    """So that a tiny base does not talk for minutes."""
    for benchmark in benchmarks:
        if benchmark.task.OUTPUT_TYPE == "generate_until":
            benchmark.task.config.generation_kwargs["max_gen_toks"] = 6


class Remembering:
    """A model of the harness that gives the right answer, or another, and remembers what it was asked."""

    rank, world_size = 0, 1

    def __init__(self, *, right: bool) -> None:
        self.right = right
        self.requests: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.requests += requests
        return [(0.0 if (request.idx == request.doc["answer"]) is self.right else -9.0, False) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.requests += requests
        return [request.doc["answer"] if self.right else "I pass 1234567" for request in requests]


@pytest.mark.parametrize("name", Harness().names)
def test_right_answers_score_1_and_wrong_ones_0(name: str) -> None:
    for right in (True, False):
        for metric, values in score(load(name), Remembering(right=right)).items():
            if name == "svamp" and metric.endswith("strict-match"):
                assert set(values) == {0.0}  # its answers are numbers without the four signs of gsm8k
            else:
                assert set(values) == {float(right)}, (name, metric)


def test_questions_are_asked_as_the_harness_asks_them() -> None:
    asked = {}
    for name in ("mmlu", "gsm8k", "arc_easy", "truthfulqa_mc1"):
        model = Remembering(right=True)
        score(load(name, limit=1), model)
        asked[name] = model.requests[0]
    doc = asked["mmlu"].doc
    subject_name = doc["source"].split("/")[1].replace("_", " ")
    letters = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    assert asked["mmlu"].args == (
        f"The following are multiple choice questions (with answers) about {subject_name}.\n\n"
        f"{doc['question'].strip()}\n{letters}Answer:",
        " A",
    )
    assert asked["gsm8k"].args[0] == f"Question: {asked['gsm8k'].doc['question']}\nAnswer:"
    assert asked["arc_easy"].args == (
        f"Question: {asked['arc_easy'].doc['question']}\nAnswer:",
        " " + asked["arc_easy"].doc["choices"][0],
    )
    truthful = asked["truthfulqa_mc1"].args[0]
    assert truthful.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert truthful.endswith(f"in Barcelona, Spain.\n\nQ: {asked['truthfulqa_mc1'].doc['question']}\nA:")


def test_a_chat_template_is_used_where_a_task_may_chat(subject: Subject, finished: Finished) -> None:
    for name, chats in (("gsm8k", True), ("hellaswag", True), ("humaneval", False)):
        model = Remembering(right=True)
        lm = model_of(subject, finished)
        model.apply_chat_template = lm.apply_chat_template  # type: ignore[attr-defined]
        model.tokenizer_name = "tiny"  # type: ignore[attr-defined]
        score(load(name, limit=1), model, chat_template=True)
        assert model.requests[0].args[0].startswith("<|im_start|>user\n") is chats
        assert model.requests[0].args[0].endswith("<|im_start|>assistant\n") is chats


def test_the_router_reads_the_question_and_the_label_is_the_tasks(
    subject: Subject, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("medqa", limit=2)
    asked: list[tuple[Any, ...]] = []
    original = Mixes.of_mode

    def watch(self: Mixes, mode: Any, **options: Any) -> list[Mix]:
        mixes = original(self, mode, **options)
        asked.append((options["labels"], options["texts"], mixes))
        return mixes

    monkeypatch.setattr(Mixes, "of_mode", watch)
    for mode in ("routed", "label"):
        run_benchmark(benchmark, mode, subject, finished=finished, max_tokens=2048, chat_template=False)
    (_, texts, routed), (labels, _, by_label) = asked
    assert texts == [doc["question"] for doc in benchmark.task.test_docs() for _ in range(4)]
    assert subject.router is not None
    assert routed == [subject.router.route(text).mix for text in texts]
    assert set(labels) == {"medical"}
    assert by_label == [{"chat": 0.2, "medical": 1.0}] * 8


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInvalid, match=r"no task 'squad'; the tasks are \['arc_challenge'"):
        Benchmarks(Plan(data=SAMPLES, tasks=("squad",)), SAMPLES, seed=0)
    with pytest.raises(EvaluationInvalid, match=r"no file '.*gsm8k_test\.jsonl'"):
        Benchmarks(Plan(data=tmp_path, tasks=("gsm8k",)), tmp_path, seed=0)
    with pytest.raises(
        EvaluationInvalid, match=r"\['humaneval'\] run code that the model wrote; allow it with --run-code"
    ):
        Benchmarks(Plan(data=SAMPLES, tasks=("humaneval", "gsm8k")), SAMPLES, seed=0)
    without = Benchmarks(Plan(data=SAMPLES, limit=1), SAMPLES, seed=0)
    assert "['humaneval', 'mbpp'] were left out" in without.notes[0]
    assert {benchmark.name for benchmark in without._benchmarks}.isdisjoint({"humaneval", "mbpp"})


def test_a_task_of_a_domain_that_the_store_lacks_is_refused_in_label_mode(
    base: Base, tmp_path: Path, finished: Finished
) -> None:
    small = open_subject(base, make_evaluation_store(tmp_path, base, ("chat", "math")), RoutingPolicy())
    with pytest.raises(EvaluationInvalid, match=r"needs the domain 'medical', which the store lacks"):
        run_benchmark(load("medqa", 1), "label", small, finished=finished, max_tokens=512, chat_template=False)


def test_the_same_log_likelihoods_come_over_http(
    base_folder: Path, store: Path, subject: Subject, finished: Finished
) -> None:
    settings = load_settings(
        flags={
            "server": {"served_model_name": "tiny"},
            "engine": {"max_model_len": 2048, "kv_cache_tokens": 4096},
            "store": {"path": store, "device_budget_bytes": 10**8},
        }
    )
    base = load_base(str(base_folder), base_format="dense", dtype="float32", device="cpu")  # the engine's own
    with serve_app(compose_app_for(base, settings)) as url:
        for model, mix in (("tiny:base", {}), ("tiny:math", {"math": 1.0})):
            served = served_model(url, model, max_length=2048)
            check_alike(served, subject, finished, mix)


def check_alike(served: Any, subject: Subject, finished: Finished, mix: Mix) -> None:
    ours = model_of(subject, finished, [mix])
    choosing = [load(name, limit=5) for name in ("arc_easy", "hellaswag", "medmcqa")]
    parity = compare(choosing, ours, served)
    assert parity.choices > 40
    assert parity.max_difference < 1e-4  # of sums of up to a hundred float32 log probabilities
    assert parity.same_greedy
    assert parity.same_scores
    generating = load("gsm8k", limit=3)
    short_texts([generating])
    assert score(generating, served) == score(generating, ours)


def test_the_harness_finds_the_servers_tokenizer_by_itself(base_folder: Path, base: Base, tmp_path: Path) -> None:
    settings = load_settings(flags={"store": {"path": tmp_path / "store"}})
    with serve_app(compose_app_for(load_base(str(base_folder), base_format="dense", device="cpu"), settings)) as url:
        assert check_remote_tokenizer_support(f"{url}/v1/completions")
        remote = RemoteTokenizer(f"{url}/v1/completions")
        local = base.tokenizer
        assert (remote.bos_token_id, remote.eos_token_id) == (local.bos_token_id, local.eos_token_id)
        assert remote.encode("the quick fox é") == local.encode("the quick fox é", add_special_tokens=False)
        assert remote.decode(remote.encode("the quick fox é")) == "the quick fox é"
        turns = [{"role": "user", "content": "hello"}]
        rendered = local.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert remote.apply_chat_template(turns) == rendered
