"""Which sequences run, in which order, and how their prompts are cut into chunks."""

from engine.kv_cache import KvCache
from engine.scheduler import ScheduledRow, Scheduler
from engine.sequence import Sequence, new_sequence
from engine.types import GenerationRequest, SamplingParams
from tests.tiny_bases import tiny_tokenizer


def sequence(name: str, *, prompt: int, max_tokens: int = 4) -> Sequence:
    request = GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))
    return new_sequence(request, lambda _: None, tokenizer=tiny_tokenizer(), eos_token_ids=frozenset())


def scheduler(*sequences: Sequence, positions: int = 1000, max_rows: int = 4, max_step_tokens: int = 16) -> Scheduler:
    made = Scheduler(KvCache(positions), max_rows=max_rows, max_step_tokens=max_step_tokens)
    for item in sequences:
        made.add(item)
    return made


def compute(rows: list[ScheduledRow]) -> None:
    """What the engine does with a step, without a model."""
    for row in rows:
        sampled = row.is_sampled
        row.sequence.num_computed += row.num_tokens
        if sampled:
            row.sequence.token_ids.append(0)


def test_long_prompts_come_in_chunks_while_others_decode() -> None:
    short, long = sequence("short", prompt=3), sequence("long", prompt=40)
    plan = scheduler(short, long)
    steps = []
    for _ in range(4):
        rows = plan.schedule()
        steps.append([(row.sequence.request.request_id, row.num_tokens) for row in rows])
        compute(rows)
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
    plan = Scheduler(KvCache(1000), max_rows=4, max_step_tokens=16, prompt_tokens_beside_decode=6)
    plan.add(stream)
    compute(plan.schedule())
    plan.add(first)
    plan.add(second)
    while first.num_pending > 1 or second.num_pending > 1:
        rows = plan.schedule()
        decoding = [row for row in rows if row.num_tokens == 1 and row.sequence.num_output]
        assert stream in [row.sequence for row in decoding]  # it gets a token in every step
        assert sum(row.num_tokens for row in rows) - len(decoding) <= 6
        if first.num_pending > 6:
            assert [row.sequence for row in rows] == [stream, first]  # the oldest prompt first
        compute(rows)
    plan.remove(stream)
    third = sequence("3", prompt=14)
    plan.remove(first)
    plan.remove(second)
    plan.add(third)
    assert [row.num_tokens for row in plan.schedule()] == [14]  # nobody decodes: the whole budget


def test_no_step_exceeds_its_token_budget() -> None:
    plan = scheduler(*(sequence(str(i), prompt=30) for i in range(4)))
    for _ in range(20):
        rows = plan.schedule()
        assert sum(row.num_tokens for row in rows) <= 16
        compute(rows)


def test_the_oldest_waiting_sequence_is_never_overtaken() -> None:
    first, big, small = sequence("first", prompt=60), sequence("big", prompt=80), sequence("small", prompt=2)
    plan = scheduler(first, big, small, positions=100)
    plan.schedule()
    assert plan.running == [first]  # small would fit, but big is older
    plan.remove(first)
    plan.schedule()
    assert plan.running == [big, small]


def test_removing_frees_the_span_wherever_the_sequence_is() -> None:
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
