"""The real engine on tiny random bases, compared with transformers' own forward and slowly added stacks."""

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from engine.block_table import BLOCK_TOKENS
from engine.engine import Engine
from engine.errors import EngineFailed, EngineStopped, PromptTooLong
from engine.model.base import load_base
from engine.model.hidden import hidden_states
from engine.model.inject import inject
from engine.model.moe_lora import MoeLoraConfig, ServingDeltas, StackPack
from engine.model.training_form import MoeLoraStack, TrainingDeltas
from engine.runner import Runner
from engine.slots import ResidentDomain
from engine.types import (
    EngineSnapshot,
    Event,
    FinishedEvent,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    TokensEvent,
)
from tests.engines import Client, Collected, collect
from tests.reference import ReferenceModel, WeightedStack
from tests.servers import wait_until
from tests.stacks import random_projections, to_serving

ARCHITECTURES = ["llama", "gemma3", "qwen2", "qwen3", "mistral"]
CONFIGS = [MoeLoraConfig(4, 4, 2, 4.0), MoeLoraConfig(2, 8, 1, 2.0), MoeLoraConfig(3, 2, 3, 4.0)]
LONG = 1 << 30


def greedy(num_tokens: int = 12, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **options)  # type: ignore[arg-type]


@contextmanager
def running_engine(folder: Path, *, fused_step: bool = True, **options: int) -> Iterator[Client]:
    base = load_base(str(folder), base_format="dense", dtype="float32")
    settings = {"max_batch_rows": 4, "max_model_len": 128, "kv_cache_tokens": 512, **options}
    engine = Engine(base, fused_step=fused_step, **settings)
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


def settled(engine: Engine) -> EngineSnapshot:
    """What the engine was doing after the step that sent its latest event."""
    for _ in range(2):  # the first may run before that step's snapshot
        engine.run_on_device(lambda: None).result(timeout=60)
    return engine.snapshot()


def domains_of(client: Client) -> tuple[list[ResidentDomain], list[list[WeightedStack]]]:
    """Three domains of unlike shapes, the last of two rounds; and the same for the reference, at weight 1."""
    geometry = client.engine.base.geometry
    drawn = [(c, random_projections(geometry, c, seed=i)) for i, c in enumerate([*CONFIGS, CONFIGS[0]])]
    rounds = [[0], [1], [2, 3]]
    places = [(f"d{domain}", number) for domain, of_one in enumerate(rounds) for number in range(1, len(of_one) + 1)]
    dtype, panelled = client.engine.base.dtype, client.engine.wants_panels
    stacks = [
        to_serving(geometry, config, p, dtype=dtype, domain=domain, round=number, panelled=panelled)
        for (config, p), (domain, number) in zip(drawn, places, strict=True)
    ]
    resident = [ResidentDomain(f"d{i}", f"v{i}", tuple(stacks[j] for j in r)) for i, r in enumerate(rounds)]
    reference = [[(drawn[j][0], drawn[j][1], 1.0) for j in r] for r in rounds]
    return resident, reference


def weighted(reference: list[list[WeightedStack]], mix: dict[int, float]) -> list[WeightedStack]:
    return [(config, p, mix[i]) for i in mix for config, p, _ in reference[i]]


MIXES: list[dict[int, float]] = [{}, {0: 1.0}, {1: 0.7, 2: 0.3}, {0: 0.2, 1: 0.9, 2: 1.0}]
PROMPTS = [list(range(5, 5 + n)) for n in (3, 17, 40, 1)]


@pytest.mark.parametrize("fused_step", [True, False], ids=["fused", "modules"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_batch_equals_each_request_computed_the_plain_way(
    architecture: str, fused_step: bool, tiny_base_folder: Callable[[str], Path]
) -> None:
    folder = tiny_base_folder(architecture)
    reference = ReferenceModel(folder)
    with running_engine(folder, fused_step=fused_step, max_step_tokens=16) as client:  # prompts arrive in chunks
        domains, slow = domains_of(client)
        events = [
            client.submit(prompt, greedy(), [(domains[i], w) for i, w in mix.items()])[1]
            for prompt, mix in zip(PROMPTS, MIXES, strict=True)
        ]
        together = [collect(pending) for pending in events]
        alone = [
            client.run(prompt, greedy(), [(domains[i], w) for i, w in mix.items()])
            for prompt, mix in zip(PROMPTS, MIXES, strict=True)
        ]
    for prompt, mix, joint, single in zip(PROMPTS, MIXES, together, alone, strict=True):
        expected = reference.greedy(prompt, weighted(slow, mix), 12)
        assert joint.token_ids == expected
        assert single.token_ids == expected


@pytest.fixture(scope="module")
def llama(tiny_base_folder: Callable[[str], Path]) -> Iterator[Client]:
    with running_engine(tiny_base_folder("llama")) as client:
        yield client


@pytest.fixture(scope="module")
def llama_reference(tiny_base_folder: Callable[[str], Path]) -> ReferenceModel:
    return ReferenceModel(tiny_base_folder("llama"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_prompt_that_begins_like_a_finished_one_continues_it(
    architecture: str, tiny_base_folder: Callable[[str], Path]
) -> None:
    folder = tiny_base_folder(architecture)
    reference = ReferenceModel(folder)
    prompt = PROMPTS[2]
    with running_engine(folder) as client:
        domains, slow = domains_of(client)
        mix, other = [(domains[0], 1.0), (domains[2], 0.5)], [(domains[0], 0.9), (domains[2], 0.5)]
        first = client.run(prompt, greedy(), mix)
        again = client.run(prompt, greedy(), mix)
        turn = [*prompt, *first.token_ids, 60, 61, 62]  # as a conversation goes on
        second = client.run(turn, greedy(), mix)
        elsewhere = client.run(turn, greedy(), other)
        without = client.run(turn, greedy())
    assert (first.cached_tokens, again.cached_tokens) == (0, 2 * BLOCK_TOKENS)  # of 40 tokens
    assert second.cached_tokens == 3 * BLOCK_TOKENS  # of 51: the last token of an answer is never fed back
    assert elsewhere.cached_tokens == without.cached_tokens == 0
    weights = {0: 1.0, 2: 0.5}
    assert first.token_ids == again.token_ids == reference.greedy(prompt, weighted(slow, weights), 12)
    assert second.token_ids == reference.greedy(turn, weighted(slow, weights), 12)
    assert elsewhere.token_ids == reference.greedy(turn, weighted(slow, {0: 0.9, 2: 0.5}), 12)
    assert without.token_ids == reference.greedy(turn, [], 12)


def test_what_is_kept_makes_room_for_what_runs(tiny_base_folder: Callable[[str], Path]) -> None:
    folder = tiny_base_folder("llama")
    reference = ReferenceModel(folder)
    prompts = [[start, *range(20, 60)] for start in range(5, 17)]
    with running_engine(folder, kv_cache_tokens=128) as client:
        for _ in range(2):
            events = [client.submit(prompt, greedy(8))[1] for prompt in prompts]
            got = [collect(pending) for pending in events]
            assert [one.token_ids for one in got] == [reference.greedy(prompt, [], 8) for prompt in prompts]
        assert settled(client.engine).kv_used_ratio == 0.0


@pytest.mark.parametrize("fused_step", [True, False], ids=["fused", "modules"])
def test_those_that_gave_way_go_on_as_if_nothing_had_happened(
    fused_step: bool, tiny_base_folder: Callable[[str], Path]
) -> None:
    """Sampled with a seed and penalties, which depend on all that came before."""
    sampling = [
        SamplingParams(max_tokens=40, seed=number, frequency_penalty=0.5, logprobs=1, ignore_eos=True)
        for number in range(4)
    ]
    answers: dict[int, list[Collected]] = {}
    for tokens in (1024, 128):
        with running_engine(tiny_base_folder("llama"), kv_cache_tokens=tokens, fused_step=fused_step) as client:
            domains, _ = domains_of(client)
            with held(client.engine):
                queues = [
                    client.submit(PROMPTS[1], one, [(domains[i], weight) for i, weight in mix.items()])[1]
                    for one, mix in zip(sampling, MIXES, strict=True)
                ]
            answers[tokens] = [collect(pending) for pending in queues]
            snapshot = settled(client.engine)
            assert (snapshot.preempted > 0) == (tokens == 128)
            assert snapshot.kv_used_ratio == 0.0
    for ample, scarce in zip(answers[1024], answers[128], strict=True):
        assert len(scarce.token_ids) == 40
        assert scarce.token_ids == ample.token_ids
        assert scarce.text == ample.text
        tolerance = 0.0 if fused_step else 1e-4
        assert [one.logprob for one in scarce.logprobs] == pytest.approx(
            [one.logprob for one in ample.logprobs], abs=tolerance
        )


def test_prompt_logprobs_are_whole_though_the_sequence_gave_way(
    tiny_base_folder: Callable[[str], Path], llama_reference: ReferenceModel
) -> None:
    prompt = list(range(5, 100))
    expected = llama_reference.logits(prompt, []).log_softmax(-1)
    folder = tiny_base_folder("llama")
    with running_engine(folder, kv_cache_tokens=128, max_step_tokens=8, prompt_tokens_beside_decode=2) as client:
        with held(client.engine):
            client.submit(PROMPTS[0], greedy(60))
            _, events = client.submit(prompt, greedy(2, prompt_logprobs=0))
        got = collect(events)
        assert settled(client.engine).preempted == 1
    assert got.prompt_logprobs is not None
    assert len(got.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(got.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)


@pytest.mark.parametrize("fused_step", [True, False], ids=["fused", "modules"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_is_only_read_has_the_hidden_states_of_the_base_alone(
    architecture: str, fused_step: bool, tiny_base_folder: Callable[[str], Path]
) -> None:
    """In chunks, beside a stream with stacks, at every layer; two of them at once."""
    text, other = list(range(5, 45)), [7, 9, 11]
    folder = tiny_base_folder(architecture)
    with running_engine(folder, fused_step=fused_step, prompt_tokens_beside_decode=6) as client:
        base, (domains, _) = load_base(str(folder), base_format="dense", dtype="float32"), domains_of(client)
        for layer in range(base.num_layers + 1):
            with held(client.engine):
                stream = client.submit(PROMPTS[1], greedy(20), [(domains[0], 1.0)])[1]
                reads = [client.engine.read(ids, layer) for ids in (text, other)]
            for ids, read in zip((text, other), reads, strict=True):
                got, expected = read.result(timeout=60), hidden_states(base, ids, layer)
                for mine, theirs in zip(got, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
            assert len(collect(stream).token_ids) == 20
        assert settled(client.engine).kv_used_ratio == 0.0


def test_a_read_waits_neither_for_a_full_batch_nor_for_prompts(tiny_base_folder: Callable[[str], Path]) -> None:
    with running_engine(tiny_base_folder("llama"), prompt_tokens_beside_decode=4, kv_cache_tokens=2048) as client:
        with held(client.engine):
            streams = [client.submit(PROMPTS[3], greedy(100))[1]]
            streams += [client.submit([n, *range(90)], greedy(30))[1] for n in range(7)]
            read = client.engine.read(list(range(8)), 1)
            first_steps = client.engine.snapshot().steps
        read.result(timeout=60)
        assert (
            client.engine.snapshot().steps - first_steps <= 8
        )  # of four tokens, of which it has half; the prompts take 160
        assert all(collect(stream).error is None for stream in streams)


def test_a_read_that_gave_way_is_whole(tiny_base_folder: Callable[[str], Path]) -> None:
    folder = tiny_base_folder("llama")
    text = list(range(5, 100))
    with running_engine(folder, kv_cache_tokens=128, max_step_tokens=8, prompt_tokens_beside_decode=2) as client:
        with held(client.engine):
            client.submit(PROMPTS[0], greedy(60))
            read = client.engine.read(text, 1)
            stream = client.submit(PROMPTS[0], greedy(60))[1]
        mid, last = read.result(timeout=60)
        assert collect(stream).error is None
    expected = hidden_states(load_base(str(folder), base_format="dense", dtype="float32"), text, 1)
    torch.testing.assert_close(mid, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, expected[1], atol=1e-4, rtol=1e-4)


def test_a_read_longer_than_the_context_is_computed_apart(tiny_base_folder: Callable[[str], Path]) -> None:
    with running_engine(tiny_base_folder("llama"), max_model_len=32, kv_cache_tokens=32) as client:
        mid, last = client.engine.read(list(range(60)), 1).result(timeout=60)
        assert mid.shape == last.shape == (60, client.engine.base.text_config.hidden_size)


def test_a_read_of_nothing_or_of_foreign_tokens_is_refused_and_a_stopped_engine_says_so(llama: Client) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        llama.engine.read([], 1)
    with pytest.raises(ValueError, match="99999"):
        llama.engine.read([99999], 1)
    engine = Engine(llama.engine.base, max_batch_rows=2, max_model_len=64, kv_cache_tokens=64)
    read = engine.read([5, 6], 1)
    engine.stop()
    assert isinstance(read.exception(timeout=60), EngineStopped)


def test_prompt_logprobs_are_whole_though_the_prompt_is_known(llama: Client) -> None:
    sampling = greedy(2, prompt_logprobs=0)
    first, again = llama.run(PROMPTS[2], sampling), llama.run(PROMPTS[2], sampling)
    assert again.cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == len(PROMPTS[2])


def test_logprobs_equal_the_plain_forward(llama: Client, llama_reference: ReferenceModel) -> None:
    domains, slow = domains_of(llama)
    prompt = PROMPTS[1]
    got = llama.run(prompt, greedy(5, logprobs=3, prompt_logprobs=2), [(domains[0], 0.5)])
    expected = llama_reference.logits(prompt + got.token_ids, weighted(slow, {0: 0.5})).log_softmax(-1)
    for position, entry in enumerate(got.logprobs, len(prompt) - 1):
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)
        torch.testing.assert_close(
            torch.tensor([value for _, value in entry.top]), expected[position].topk(3).values, atol=1e-4, rtol=0
        )
    assert got.prompt_logprobs is not None
    assert got.prompt_logprobs[0] is None
    assert len(got.prompt_logprobs) == len(prompt)
    for position, known in enumerate(got.prompt_logprobs[1:]):
        assert known is not None
        assert known.token_id == prompt[position + 1]
        assert known.logprob == pytest.approx(expected[position, known.token_id].item(), abs=1e-4)
        assert len(known.top) == 2


def test_prompt_logprobs_alone_generate_nothing(llama: Client) -> None:
    got = llama.run(PROMPTS[1], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert got.token_ids == []
    assert got.finished is not None
    assert got.finished.reason == "length"
    assert got.prompt_logprobs is not None
    assert len(got.prompt_logprobs) == len(PROMPTS[1])


def test_a_seed_gives_the_same_text_alone_and_in_company(llama: Client) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    alone = llama.run(PROMPTS[0], sampling)
    others = [llama.submit(PROMPTS[2], greedy(30))[1] for _ in range(2)]
    joint = llama.run(PROMPTS[0], sampling)
    for other in others:
        collect(other)
    assert joint.token_ids == alone.token_ids
    another = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, top_k=50, seed=8, ignore_eos=True)
    assert llama.run(PROMPTS[0], another).token_ids != alone.token_ids


def test_more_requests_than_rows_all_finish_with_their_own_answers(llama: Client) -> None:
    expected = [llama.run(prompt, greedy(6)).token_ids for prompt in PROMPTS]
    events = [llama.submit(PROMPTS[i % 4], greedy(6))[1] for i in range(13)]
    for i, pending in enumerate(events):
        assert collect(pending).token_ids == expected[i % 4]


def test_a_request_joins_and_leaves_while_others_go_on(llama: Client) -> None:
    _, long_events = llama.submit(PROMPTS[0], greedy(60))
    first = long_events.get(timeout=60)
    assert isinstance(first, PromptEvent)
    short = llama.run(PROMPTS[1], greedy(3))
    assert short.finished is not None
    so_far = [long_events.get() for _ in range(long_events.qsize())]
    assert not any(isinstance(event, FinishedEvent) for event in so_far)  # the long one is still running
    assert collect(long_events).finished is not None


def test_cancelled_requests_give_back_everything(llama: Client) -> None:
    running_id, running = llama.submit(PROMPTS[0], greedy(100))
    while not isinstance(running.get(timeout=60), TokensEvent):
        pass
    fillers = [llama.submit(PROMPTS[0], greedy(100)) for _ in range(3)]
    waiting_id, waiting = llama.submit(PROMPTS[0], greedy(100))
    for request_id in (waiting_id, running_id, *(i for i, _ in fillers), "never-heard-of"):
        llama.engine.cancel(request_id)
    for pending in (running, waiting, *(q for _, q in fillers)):
        finished = collect(pending).finished
        assert finished is not None
        assert finished.reason == "cancelled"
    llama.engine.run_on_device(lambda: None).result(timeout=60)
    snapshot = llama.engine.snapshot()
    assert (snapshot.running, snapshot.waiting, snapshot.kv_used_ratio) == (0, 0, 0.0)


def test_stop_string_ends_the_text_and_is_not_shown(llama: Client) -> None:
    whole = llama.run(PROMPTS[0], greedy(20)).text
    stop = whole[6:9]
    got = llama.run(PROMPTS[0], greedy(20, stop=(stop,)))
    assert got.text == whole[: whole.index(stop)]
    assert got.finished is not None
    assert got.finished.reason == "stop"
    kept = llama.run(PROMPTS[0], greedy(20, stop=(stop,), include_stop=True))
    assert kept.text == whole[: whole.index(stop) + len(stop)]


def test_end_of_sequence_token_ends_unless_ignored_or_too_early(llama: Client) -> None:
    end = next(iter(llama.engine.base.eos_token_ids))
    bias = {end: 100.0}
    stopped = llama.run(PROMPTS[0], SamplingParams(max_tokens=9, temperature=0.0, logit_bias=bias))
    assert stopped.token_ids == [end]
    assert stopped.text == ""
    later = llama.run(PROMPTS[0], SamplingParams(max_tokens=9, min_tokens=4, temperature=0.0, logit_bias=bias))
    assert len(later.token_ids) == 5
    assert later.token_ids[-1] == end
    ignored = llama.run(PROMPTS[0], greedy(9, logit_bias=bias))
    assert ignored.token_ids == [end] * 9


def test_jobs_run_in_the_engine_thread_with_every_stack_off(llama: Client, llama_reference: ReferenceModel) -> None:
    domains, _ = domains_of(llama)
    _, events = llama.submit(PROMPTS[0], greedy(40), [(domains[0], 1.0)])
    ids = torch.tensor([PROMPTS[1]])

    def base_logits() -> tuple[str, torch.Tensor]:
        with torch.inference_mode():
            return threading.current_thread().name, llama.engine.base.model(input_ids=ids, use_cache=False).logits[0]

    name, logits = llama.engine.run_on_device(base_logits).result(timeout=60)
    assert name == "engine"
    torch.testing.assert_close(logits.clone(), llama_reference.logits(PROMPTS[1], []), atol=1e-4, rtol=1e-4)
    assert len(collect(events).token_ids) == 40


def test_a_failing_job_reaches_its_caller_only(llama: Client) -> None:
    def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        llama.engine.run_on_device(fail).result(timeout=60)
    assert len(llama.run(PROMPTS[0], greedy(2)).token_ids) == 2


def test_a_failing_step_fails_its_requests_and_not_the_engine(llama: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("engine.runner.FusedRow", None)
        assert isinstance(llama.run(PROMPTS[0], greedy(2)).error, EngineFailed)
    assert len(llama.run(PROMPTS[0], greedy(2)).token_ids) == 2


def test_steps_that_only_fail_end_the_engine(
    tiny_base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is lost; one that works again in between is not."""
    with running_engine(tiny_base_folder("llama")) as client:
        run, turns = Runner.run, itertools.count(1)

        def fail(*_: Any) -> NoReturn:
            raise RuntimeError("device lost")

        def run_or_fail(self: Runner, *rows: Any) -> Any:
            return run(self, *rows) if next(turns) % 8 == 0 else fail()

        monkeypatch.setattr(Runner, "run", run_or_fail)
        for _ in range(16):
            collect(client.submit([5, 6], greedy(1))[1])
        assert client.engine.heartbeat_age_seconds() < 1
        monkeypatch.setattr(Runner, "run", fail)
        for _ in range(8):
            assert isinstance(collect(client.submit([5, 6], greedy(1))[1]).error, EngineFailed)
        wait_until(lambda: math.isinf(client.engine.heartbeat_age_seconds()), what="the engine has ended")
        with pytest.raises(EngineFailed, match="8 steps failed one after the other: device lost"):
            client.submit([5, 6], greedy(1))


def test_a_panic_ends_the_engine_and_tells_everybody(
    tiny_base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libraries in Rust raise is no Exception."""

    class Panic(BaseException): ...

    def panic(*_: Any) -> NoReturn:
        raise Panic("called unwrap on a None")

    with running_engine(tiny_base_folder("llama")) as client:
        monkeypatch.setattr("engine.engine.sample", panic)
        assert isinstance(collect(client.submit([5, 6], greedy(1))[1]).error, EngineFailed)
        wait_until(lambda: math.isinf(client.engine.heartbeat_age_seconds()), what="the engine has ended")


def test_a_panic_of_a_job_reaches_its_caller_and_ends_the_engine(tiny_base_folder: Callable[[str], Path]) -> None:
    class Panic(BaseException): ...

    def panic() -> NoReturn:
        raise Panic("called unwrap on a None")

    with running_engine(tiny_base_folder("llama")) as client:
        with pytest.raises(Panic):
            client.engine.run_on_device(panic).result(timeout=60)
        wait_until(lambda: math.isinf(client.engine.heartbeat_age_seconds()), what="the engine has ended")


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_whatever_cannot_be_let_go_of_is_told_all_the_same(
    tiny_base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """And so are those that are on the way."""
    with running_engine(tiny_base_folder("llama")) as client:
        name, events = client.submit(PROMPTS[0], greedy(100 if is_cancelled else 20))
        events.get(timeout=60)

        is_failing, has_submitted = threading.Event(), threading.Event()

        def fail() -> NoReturn:
            is_failing.set()
            has_submitted.wait(60)
            raise RuntimeError("device lost")

        monkeypatch.setattr(client.engine._runner, "release_pack", fail)
        if is_cancelled:
            client.engine.cancel(name)
        assert is_failing.wait(60)
        _, on_the_way = client.submit(PROMPTS[0], greedy(1))
        job = client.engine.run_on_device(lambda: None)
        has_submitted.set()
        assert isinstance(collect(events).error, EngineFailed)
        assert isinstance(collect(on_the_way).error, EngineFailed)
        assert isinstance(job.exception(timeout=60), EngineFailed)
        wait_until(lambda: math.isinf(client.engine.heartbeat_age_seconds()), what="the engine has ended")


def test_what_does_not_fit_is_refused_with_the_numbers(llama: Client) -> None:
    with pytest.raises(PromptTooLong, match=r"3 prompt tokens and max_tokens 126 exceed the context of 128"):
        llama.submit(PROMPTS[0], greedy(126))
    with pytest.raises(ValueError, match="99999"):
        llama.submit([99999], greedy(1))
    with pytest.raises(ValueError, match="at least one token"):
        llama.submit([], greedy(1))


def test_a_stopped_engine_fails_what_it_holds_and_refuses_more(tiny_base_folder: Callable[[str], Path]) -> None:
    with running_engine(tiny_base_folder("llama")) as client:
        _, events = client.submit(PROMPTS[0], greedy(100))
        events.get(timeout=60)
        client.engine.stop()
        assert isinstance(collect(events).error, EngineStopped)
        with pytest.raises(EngineStopped):
            client.submit(PROMPTS[0], greedy(1))


def test_heartbeat_is_young_while_idle(llama: Client) -> None:
    assert llama.engine.heartbeat_age_seconds() < 30


def test_an_error_outside_a_step_ends_the_engine_and_tells_everybody(
    tiny_base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(tiny_base_folder("llama")) as client:
        _, events = client.submit(PROMPTS[0], greedy(100))
        events.get(timeout=60)
        monkeypatch.setattr(client.engine._scheduler, "schedule", None)
        assert isinstance(collect(events).error, EngineFailed)
        with pytest.raises(EngineFailed, match="loop ended by an error"):
            client.submit(PROMPTS[0], greedy(1))
        assert client.engine.heartbeat_age_seconds() == math.inf


def test_a_request_id_in_use_is_refused(llama: Client) -> None:
    request = GenerationRequest("twice", (5, 6), greedy(40))
    first: queue.Queue[Event] = queue.Queue()
    second: queue.Queue[Event] = queue.Queue()
    llama.engine.submit(request, first.put)
    llama.engine.submit(request, second.put)
    assert "twice" in str(collect(second).error)
    assert len(collect(first).token_ids) == 40


@pytest.mark.parametrize(("fused_step", "tolerance"), [(True, 0.0), (False, 0.05)])
def test_bfloat16_mixed_batch_against_alone(
    fused_step: bool, tolerance: float, tiny_base_folder: Callable[[str], Path]
) -> None:
    """Alone and in company in engines of their own, so that nothing is reused."""

    def logprobs(mixes: list[dict[int, float]], wanted: int) -> dict[int, float]:
        base = load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="bfloat16")
        engine = Engine(base, max_batch_rows=4, max_model_len=128, kv_cache_tokens=512, fused_step=fused_step)
        engine.start()
        try:
            client = Client(engine)
            domains, _ = domains_of(client)
            sampling = greedy(1, logprobs=20)
            queues = [
                client.submit(PROMPTS[1], sampling, [(domains[i], weight) for i, weight in mix.items()])[1]
                for mix in mixes
            ]
            return dict([collect(pending) for pending in queues][wanted].logprobs[0].top)
        finally:
            engine.stop()

    alone, joint = logprobs([{0: 1.0}], 0), logprobs([{}, {0: 1.0}, {1: 0.5}], 1)
    common = alone.keys() & joint.keys()
    assert len(common) >= 15
    assert all(abs(joint[token] - alone[token]) <= tolerance for token in common)


def test_finished_event_counts_tokens_and_times_each_phase(llama: Client) -> None:
    finished = llama.run(PROMPTS[1], greedy(5)).finished
    assert isinstance(finished, FinishedEvent)
    assert (finished.prompt_tokens, finished.completion_tokens, finished.reason) == (17, 5, "length")
    assert set(finished.seconds) == {"queue", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in finished.seconds.values())


def test_a_prompt_that_fills_the_context_runs_in_a_cache_of_that_size(tiny_base_folder: Callable[[str], Path]) -> None:
    with running_engine(tiny_base_folder("llama"), max_model_len=64, kv_cache_tokens=64) as client:
        whole = client.run(range(64), SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert whole.prompt_logprobs is not None
        assert len(whole.prompt_logprobs) == 64
        assert len(client.run(range(63), greedy(1)).token_ids) == 1


def test_prompt_logprobs_do_not_depend_on_chunks(
    llama: Client, tiny_base_folder: Callable[[str], Path], llama_reference: ReferenceModel
) -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    expected = llama_reference.logits(PROMPTS[2], []).log_softmax(-1)
    with running_engine(tiny_base_folder("llama"), max_step_tokens=8) as client:
        for answer in (client.run(PROMPTS[2], sampling), llama.run(PROMPTS[2], sampling)):
            assert answer.prompt_logprobs is not None
            for position, entry in enumerate(answer.prompt_logprobs[1:]):
                assert entry is not None
                assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)


def test_cancelling_in_the_middle_of_a_chunked_prompt_gives_back_everything(
    tiny_base_folder: Callable[[str], Path],
) -> None:
    with running_engine(tiny_base_folder("llama"), max_step_tokens=8) as client:
        engine = client.engine
        gate = threading.Event()
        engine.run_on_device(lambda: gate.wait(60))
        request_id, events = client.submit(range(100), greedy(4))
        engine.run_on_device(lambda: engine.cancel(request_id))  # runs after the first chunk of thirteen
        gate.set()
        finished = collect(events).finished
        assert finished is not None
        assert finished.reason == "cancelled"
        assert settled(engine).kv_used_ratio == 0.0


def test_the_pack_lets_go_of_a_mix_that_nobody_uses_while_others_run(llama: Client) -> None:
    domains, _ = domains_of(llama)
    _, long_events = llama.submit(PROMPTS[0], greedy(100))
    llama.run(PROMPTS[0], greedy(2), [(domains[0], 1.0)])
    runner = llama.engine._runner
    llama.engine.run_on_device(lambda: None).result(timeout=60)  # a step lies between two jobs
    assert llama.engine.run_on_device(lambda: runner._packed).result(timeout=60) == ()
    assert collect(long_events).finished is not None


def test_running_streams_go_on_between_waiting_jobs(llama: Client) -> None:
    _, events = llama.submit(PROMPTS[0], greedy(60))
    while not isinstance(events.get(timeout=60), TokensEvent):
        pass
    steps: list[int] = []
    jobs = [llama.engine.run_on_device(lambda: steps.append(llama.engine.snapshot().steps)) for _ in range(5)]
    for job in jobs:
        job.result(timeout=60)
    assert len(set(steps)) == 5  # a step between any two of them
    collect(events)


def test_an_engine_that_never_started_answers_what_was_submitted(tiny_base_folder: Callable[[str], Path]) -> None:
    base = load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="float32")
    engine = Engine(base, max_batch_rows=2, max_model_len=64, kv_cache_tokens=64)
    _, events = Client(engine).submit(PROMPTS[0], greedy(2))
    job = engine.run_on_device(lambda: None)
    engine.stop()
    assert isinstance(collect(events).error, EngineStopped)
    with pytest.raises(EngineStopped):
        job.result(timeout=1)


def test_packed_nf4_answers_as_its_dense_values_do(tiny_base_folder: Callable[[str], Path]) -> None:
    """The same 4-bit values, multiplied by another kernel: log probabilities agree to its rounding."""
    answers = []
    for base_format in ("nf4", "nf4-dense"):
        base = load_base(str(tiny_base_folder("llama")), base_format=base_format, dtype="float32")
        engine = Engine(base, max_batch_rows=2, max_model_len=128, kv_cache_tokens=256)
        engine.start()
        client = Client(engine)
        domains, _ = domains_of(client)
        got = client.run(PROMPTS[1], greedy(1, logprobs=20), [(domains[0], 1.0)])
        answers.append(dict(got.logprobs[0].top))
        engine.stop()
    shared = answers[0].keys() & answers[1].keys()
    assert len(shared) >= 18
    assert all(answers[0][token] == pytest.approx(answers[1][token], abs=0.02) for token in shared)


def test_a_fresh_stack_changes_no_bit_of_the_logits(tiny_base_folder: Callable[[str], Path]) -> None:
    base = load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        stack = MoeLoraStack(base.geometry, MoeLoraConfig())
        inject(base.sites, TrainingDeltas(stack))
        trained = [base.model(input_ids=ids).logits for _ in (stack.train(), stack.eval())]
        deltas = ServingDeltas()
        inject(base.sites, deltas)
        fresh = to_serving(base.geometry, MoeLoraConfig(), stack.projections(base.geometry.num_layers))
        deltas.current = StackPack([fresh]).step(torch.ones(ids.shape[1], 1))
        served = base.model(input_ids=ids).logits
    assert all(torch.equal(plain, logits) for logits in (*trained, served))
