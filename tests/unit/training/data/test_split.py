"""The split by prompt."""

from hypothesis import given
from hypothesis import strategies as st

from training.data.records import Record, SourcedRecord, SourceKey, prompt_rank
from training.data.split import split_pools, split_records

PROMPTS = st.lists(st.sampled_from("abcdefghij"), max_size=40)


def sourced(prompt: str, domain: str) -> SourcedRecord:
    return SourcedRecord(Record(prompt, "answer"), "file:1", SourceKey(domain, 0))


@given(PROMPTS, st.integers(0, 5))
def test_one_prompt_never_lands_on_both_sides(prompts: list[str], seed: int) -> None:
    records = [Record(prompt, f"answer {i}") for i, prompt in enumerate(prompts)]
    train, held = split_records(records, held_out=3, seed=seed)
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert sorted(train + held, key=lambda r: r.output) == sorted(records, key=lambda r: r.output)
    assert (train, held) == split_records(records, held_out=3, seed=seed)


@given(st.permutations([f"prompt {i}" for i in range(12)]))
def test_the_order_of_the_records_changes_nothing(prompts: list[str]) -> None:
    train, held = split_records([Record(p, "x") for p in prompts], held_out=4, seed=7)
    in_order = sorted(prompts, key=lambda p: prompt_rank(p, 7))
    assert [r.prompt for r in held] == in_order[:4]
    assert [r.prompt for r in train] == in_order[4:]


@given(st.sets(st.integers(0, 99), min_size=10), st.sets(st.integers(100, 199), max_size=5))
def test_more_records_push_prompts_over_the_border_in_one_direction_only(old: set[int], new: set[int]) -> None:
    """What was to be trained on is never held out later; as many held out as came in before them go to training."""
    before = {r.prompt for r in split_records([Record(str(i), "x") for i in old], held_out=5, seed=1)[1]}
    after = {r.prompt for r in split_records([Record(str(i), "x") for i in old | new], held_out=5, seed=1)[1]}
    assert after - before <= {str(i) for i in new}
    assert len(before - after) == len(after - before)


def test_case_spacing_and_width_make_no_other_prompt() -> None:
    records = [Record(text, "x") for text in ("Add  one", "add one", "add\none ", "\uff21\uff24\uff24 one")]
    train, held = split_records([*records, Record("other", "x")], held_out=1, seed=0)
    assert {len(train), len(held)} == {1, 4}


def test_held_out_records_are_at_least_as_many_as_asked_for() -> None:
    records = [Record(str(i // 2), str(i)) for i in range(20)]
    assert len(split_records(records, held_out=3, seed=0)[1]) == 4


def test_a_held_out_prompt_is_in_no_domains_training() -> None:
    pools = {name: [sourced(f"{i % 15 if i % 2 else name + str(i)}", name) for i in range(40)] for name in "abc"}
    split = split_pools(pools, held_out={"a": 6, "b": 6, "c": 6}, seed=1)
    held = {r.prompt for records in split.held_out.values() for r in records}
    trained = {r.prompt for records in split.train.values() for r in records}
    assert not held & trained
    assert sum(map(len, split.leaked.values())) > 0
    for name, records in pools.items():
        parts = (split.train[name], split.held_out[name], split.leaked[name])
        assert sum(map(len, parts)) == len(records)
        assert len(split.held_out[name]) >= 6


def test_a_domain_added_at_the_end_moves_nothing_before_it() -> None:
    pools = {name: [sourced(str((i * 7 + len(name)) % 30), name) for i in range(30)] for name in ("a", "bb", "ccc")}
    held_out = {"a": 5, "bb": 5, "ccc": 5}
    whole = split_pools(pools, held_out=held_out, seed=3)
    part = split_pools({name: pools[name] for name in ("a", "bb")}, held_out=held_out, seed=3)
    for name in ("a", "bb"):
        assert (part.train[name], part.held_out[name]) == (whole.train[name], whole.held_out[name])
