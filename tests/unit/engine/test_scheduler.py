"""Which sequences run, in which order, how their prompts are cut into chunks, and who gives way when room runs out."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from engine.block_table import BLOCK_TOKENS, num_blocks_for
from engine.kv_cache import KvCache
from engine.scheduler import ScheduledRow, Scheduler
from engine.sequence import Sequence, new_sequence
from engine.types import GenerationRequest, SamplingParams
from tests.tiny_bases import tiny_tokenizer


def sequence(
    name: str,
    *,
    prompt: int,
    max_tokens: int = 4,
    first_token: int = 0,
    logprobs: bool = False,
    read_layer: int | None = None,
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if logprobs else None)
    request = GenerationRequest(name, (first_token, *range(1, prompt)), sampling)
    return new_sequence(
        request, lambda _: None, tokenizer=tiny_tokenizer(), eos_token_ids=frozenset(), read_layer=read_layer
    )


def scheduler(*sequences: Sequence, positions: int = 1000, max_rows: int = 4, max_step_tokens: int = 16) -> Scheduler:
    made = Scheduler(KvCache(num_blocks_for(positions)), max_rows=max_rows, max_step_tokens=max_step_tokens)
    for item in sequences:
        made.add(item)
    return made


def step(plan: Scheduler) -> list[ScheduledRow]:
    """What the engine does in a step, without a model."""
    rows = plan.schedule()
    sampled = [row.sequence for row in rows if row.is_sampled]
    for row in rows:
        assert row.sequence.num_computed + row.num_tokens <= row.sequence.table.num_positions
        plan.advance(row)
    for sequence in sampled:
        sequence.token_ids.append(0)
        if sequence.num_output >= sequence.request.sampling.max_tokens:
            plan.remove(sequence)
    plan.check_integrity()
    return rows


def test_long_prompts_come_in_chunks_while_others_decode() -> None:
    short, long = sequence("short", prompt=3), sequence("long", prompt=40)
    plan = scheduler(short, long)
    steps = []
    for _ in range(4):
        steps.append([(row.sequence.request.request_id, row.num_tokens) for row in step(plan)])
    assert steps[0] == [("short", 3), ("long", 13)]
    assert steps[1] == [("short", 1), ("long", 15)]
    assert steps[2] == [("short", 1), ("long", 12)]
    assert steps[3] == [("short", 1), ("long", 1)]


def test_prompts_have_a_budget_of_their_own_beside_decoding_rows() -> None:
    stream, first, second = (
        sequence("stream", prompt=3, max_tokens=99),
        sequence("1", prompt=30),
        sequence("2", prompt=9),
    )
    plan = Scheduler(KvCache(60), max_rows=4, max_step_tokens=16, prompt_tokens_beside_decode=6)
    plan.add(stream)
    step(plan)
    plan.add(first)
    plan.add(second)
    while first.num_pending > 1 or second.num_pending > 1:
        is_first_alone, decoding = first.num_pending > 6, [stream, *(s for s in (first, second) if s.num_output)]
        rows = step(plan)
        assert stream in [row.sequence for row in rows]  # it gets a token in every step
        assert sum(row.num_tokens for row in rows if row.sequence not in decoding) <= 6
        if is_first_alone:
            assert [row.sequence for row in rows] == [stream, first]  # the oldest prompt first
    plan.remove(stream)
    third = sequence("3", prompt=14)
    plan.remove(first)
    plan.remove(second)
    plan.add(third)
    assert [row.num_tokens for row in plan.schedule()] == [14]  # nobody decodes: the whole budget


def test_beside_many_decoding_rows_prompts_have_as_many_tokens() -> None:
    plan = Scheduler(KvCache(60), max_rows=8, max_step_tokens=32, prompt_tokens_beside_decode=3)
    for number in range(5):
        plan.add(sequence(str(number), prompt=2, max_tokens=99))
    step(plan)
    plan.add(sequence("prompt", prompt=40))
    assert [row.num_tokens for row in step(plan)] == [1, 1, 1, 1, 1, 5]


def test_no_step_exceeds_its_token_budget() -> None:
    plan = scheduler(*(sequence(str(i), prompt=30) for i in range(4)))
    for _ in range(20):
        assert sum(row.num_tokens for row in step(plan)) <= 16


def test_the_oldest_waiting_sequence_is_never_overtaken() -> None:
    first, big, small = sequence("first", prompt=60), sequence("big", prompt=80), sequence("small", prompt=2)
    plan = scheduler(first, big, small, positions=100)
    plan.schedule()
    assert plan.running == [first]  # small would fit, but big is older
    plan.remove(first)
    plan.schedule()
    assert plan.running == [big, small]


def test_removing_frees_the_blocks_wherever_the_sequence_is() -> None:
    running, waiting = sequence("running", prompt=60), sequence("waiting", prompt=60)
    plan = scheduler(running, waiting, positions=100)
    plan.schedule()
    plan.remove(waiting)
    plan.remove(running)
    plan.remove(running)  # idempotent
    plan.check_integrity()
    assert plan.used_ratio == 0
    assert plan.schedule() == []


def test_at_most_max_rows_run() -> None:
    plan = scheduler(*(sequence(str(i), prompt=1) for i in range(9)), max_rows=3)
    assert len(plan.schedule()) == 3


def finish(plan: Scheduler, *, max_steps: int = 10_000) -> list[str]:
    """Runs everything to its end; who ended, in order."""
    ended: list[str] = []
    for _ in range(max_steps):
        before = [*plan.running, *plan.waiting]
        if not before:
            return ended
        step(plan)
        ended += [s.request.request_id for s in before if s not in plan.running and s not in plan.waiting]
    raise AssertionError(f"{len(before)} sequences never ended")


def test_the_youngest_gives_way_and_goes_on_before_those_that_wait() -> None:
    old, young, late = (sequence(name, prompt=30, max_tokens=40, first_token=n) for n, name in enumerate("oyl"))
    plan = scheduler(old, young, late, positions=6 * BLOCK_TOKENS, max_step_tokens=100)
    while not plan.num_preempted:
        step(plan)
    assert plan.running == [old]
    assert list(plan.waiting) == [young, late]
    assert young.num_output > 0
    assert young.num_computed == 0
    kept = list(young.token_ids)
    assert finish(plan) == ["o", "y", "l"]
    assert young.token_ids[: len(kept)] == kept
    assert young.num_output == 40


def test_one_that_gives_way_computes_only_what_was_lost() -> None:
    old, young = sequence("old", prompt=15, max_tokens=60, first_token=1), sequence("young", prompt=62, max_tokens=9)
    plan = scheduler(old, young, positions=6 * BLOCK_TOKENS, max_step_tokens=100)
    while not plan.num_preempted:
        step(plan)
    plan.remove(old)
    [row] = plan.schedule()
    assert row.sequence is young
    assert young.num_computed >= BLOCK_TOKENS  # nobody needed its first blocks meanwhile
    assert young.num_reused == 0  # its own are no reuse


def test_a_prompt_shares_full_blocks_with_one_that_still_runs() -> None:
    first, second = sequence("first", prompt=50, max_tokens=9), sequence("second", prompt=50)
    plan = scheduler(first, max_step_tokens=100)
    step(plan)
    plan.add(second)
    rows = plan.schedule()
    assert [row.num_tokens for row in rows] == [1, 50 - 3 * BLOCK_TOKENS]
    assert second.num_reused == 3 * BLOCK_TOKENS
    assert second.table.blocks[:3] == first.table.blocks[:3]
    assert second.table.blocks[3] != first.table.blocks[3]
    plan.check_integrity()


def test_at_least_one_token_is_left_to_compute() -> None:
    first, second = sequence("first", prompt=2 * BLOCK_TOKENS), sequence("second", prompt=2 * BLOCK_TOKENS)
    plan = scheduler(first, max_step_tokens=100)
    step(plan)
    plan.add(second)
    assert [row.num_tokens for row in plan.schedule()] == [1, BLOCK_TOKENS]


def test_where_every_prompt_token_is_wanted_nothing_is_reused() -> None:
    first, second = sequence("first", prompt=50), sequence("second", prompt=50, logprobs=True)
    plan = scheduler(first, max_step_tokens=100)
    step(plan)
    plan.add(second)
    assert [row.num_tokens for row in plan.schedule()] == [1, 50]


def test_what_is_only_read_goes_first_and_leaves_nothing() -> None:
    stream, prompt = sequence("stream", prompt=3, max_tokens=99), sequence("prompt", prompt=60, first_token=9)
    plan = Scheduler(KvCache(60), max_rows=1, max_step_tokens=16, prompt_tokens_beside_decode=8)
    plan.add(stream)
    step(plan)
    plan.add(prompt)
    for name in ("first", "second"):
        plan.add(sequence(name, prompt=20, read_layer=1))
    assert [one.request.request_id for one in plan.waiting] == ["first", "second", "prompt"]
    for computed in ([8], [8], [4, 4]):  # of the first text, and then of the second
        rows = step(plan)
        assert rows[0].sequence is stream
        assert [row.num_tokens for row in rows[1:]] == computed
        assert [row.is_sampled for row in rows] == [True] + [False] * len(computed)
    first = next(one for one in plan.running if one.request.request_id == "first")
    plan.remove(first)
    again = sequence("again", prompt=20)
    assert plan.kv_cache.find(again.keys(1)) == []


def test_a_flood_of_texts_leaves_half_of_the_budget_and_most_of_the_cache_to_prompts() -> None:
    stream, prompt = sequence("stream", prompt=3, max_tokens=99), sequence("prompt", prompt=60, first_token=9)
    plan = Scheduler(KvCache(20), max_rows=2, max_step_tokens=16, prompt_tokens_beside_decode=8)
    plan.add(stream)
    step(plan)
    for number in range(50):
        plan.add(sequence(f"text {number}", prompt=20, read_layer=1))
    plan.add(prompt)
    computed = []
    while not prompt.num_output:
        rows = step(plan)
        computed += [row.num_tokens for row in rows if row.sequence is prompt]
        for ended in [one for one in plan.running if one.is_read_only and one.num_pending == 0]:
            plan.remove(ended)
            plan.add(sequence(f"after {ended.request.request_id}", prompt=20, read_layer=1))
    assert computed[:15] == [4] * 15


def test_the_last_token_of_what_is_only_read_is_no_stream() -> None:
    plan = Scheduler(KvCache(60), max_rows=4, max_step_tokens=16, prompt_tokens_beside_decode=3)
    plan.add(sequence("prompt", prompt=40))
    plan.add(sequence("text", prompt=1, read_layer=1))
    assert sorted(row.num_tokens for row in plan.schedule()) == [1, 15]  # nobody waits for a next token


Arrivals = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 60), st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=12
)


@given(Arrivals, st.integers(6, 20), st.integers(1, 5))
def test_everybody_ends_in_bounded_time_whoever_comes_when(
    arrivals: list[tuple[int, int, int, int]], blocks: int, max_rows: int
) -> None:
    """The oldest gets a token, or a chunk of 8, in every step: nobody waits for more than that of all before it."""
    plan = Scheduler(KvCache(blocks), max_rows=max_rows, max_step_tokens=24, prompt_tokens_beside_decode=8)
    room = blocks * BLOCK_TOKENS
    pending = deque(
        sorted(
            (
                (at, sequence(str(n), prompt=prompt, max_tokens=min(tokens, room - prompt), first_token=first))
                for n, (prompt, tokens, first, at) in enumerate(arrivals)
                if prompt < room
            ),
            key=lambda arrival: arrival[0],
        )
    )
    everybody = [one for _, one in pending]
    tokens = [(len(one.request.prompt_ids), one.request.sampling.max_tokens) for one in everybody]
    steps = sum(-(-(prompt + output) // 8) + output for prompt, output in tokens)  # each gives way at its very end
    for now in range(41 + steps):
        while pending and pending[0][0] <= now:
            plan.add(pending.popleft()[1])
        step(plan)
        assert [*plan.running, *plan.waiting] == [one for one in everybody if one in [*plan.running, *plan.waiting]]
    assert not plan.running
    assert not plan.waiting
    assert all(one.num_output == one.request.sampling.max_tokens for one in everybody)
    assert plan.kv_cache.num_free == blocks
