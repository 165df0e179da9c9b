"""What is kept is found by tokens and mix, and never stands in the way of what runs."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv_cache import KvCache
from engine.prefix_cache import MIN_TOKENS, MixKey, PrefixCache, Reuse

MATH: MixKey = (("math", "v1", 1.0),)
WORDS = list(range(100, 100 + 3 * MIN_TOKENS))


def cache_with(*kept: tuple[MixKey, list[int]], positions: int = 200) -> tuple[KvCache, PrefixCache]:
    kv_cache = KvCache(positions)
    prefixes = PrefixCache(kv_cache)
    for mix, tokens in kept:
        span = prefixes.reserve(len(tokens) + 5)
        assert span is not None
        prefixes.keep(mix, tokens, span)
    return kv_cache, prefixes


def test_the_longest_common_beginning_is_found() -> None:
    _, prefixes = cache_with((MATH, [*WORDS[:20], 1, 2, 3]), (MATH, [*WORDS[:30], 4]))
    assert prefixes.find(MATH, WORDS) == Reuse(source=23, num_tokens=30)


def test_at_least_one_token_is_left_to_compute() -> None:
    _, prefixes = cache_with((MATH, WORDS))
    reuse = prefixes.find(MATH, WORDS)
    assert reuse is not None
    assert reuse.num_tokens == len(WORDS) - 1


def test_another_mix_or_weight_or_version_finds_nothing() -> None:
    _, prefixes = cache_with((MATH, WORDS))
    others: list[MixKey] = [
        (),
        (("math", "v1", 0.9),),
        (("math", "v2", 1.0),),
        (("math", "v1", 1.0), ("chat", "v1", 0.2)),
    ]
    assert [prefixes.find(mix, WORDS) for mix in others] == [None] * len(others)


def test_what_begins_otherwise_or_is_short_is_not_used() -> None:
    _, prefixes = cache_with((MATH, WORDS), (MATH, WORDS[: MIN_TOKENS - 1]))
    assert prefixes.find(MATH, [0, *WORDS]) is None
    assert prefixes.find(MATH, WORDS[:MIN_TOKENS]) is None  # 15 tokens would be reused


def test_a_longer_one_replaces_those_that_it_continues() -> None:
    kv_cache, prefixes = cache_with((MATH, WORDS[:20]), ((), WORDS[:20]), (MATH, WORDS[:40]))
    assert kv_cache.num_held == prefixes.num_positions == 60  # of the base alone 20, of math 40


def test_the_least_recently_used_is_given_up_first() -> None:
    first, second = WORDS[:20], [1, *WORDS[:19]]
    kv_cache, prefixes = cache_with((MATH, first), (MATH, second), positions=50)
    assert prefixes.find(MATH, [*first, 0]) is not None  # now second is the older one
    assert prefixes.reserve(25) is not None
    assert prefixes.find(MATH, [*second, 0]) is None
    assert prefixes.find(MATH, [*first, 0]) is not None
    assert prefixes.reserve(20) is not None  # takes the other, too
    assert prefixes.num_positions == 0
    assert prefixes.reserve(6) is None
    kv_cache.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, 3)), max_size=40))
def test_any_history_holds_exactly_what_runs_and_what_is_kept(history: list[tuple[bool, int, int]]) -> None:
    kv_cache = KvCache(100)
    prefixes = PrefixCache(kv_cache)
    running = []
    for starts, length, kind in history:
        if starts:
            span = prefixes.reserve(length)
            if span is not None:
                running.append((span, kind))
            else:
                assert prefixes.num_positions == 0  # it was given up before anybody was refused
        elif running:
            span, kind = running.pop(0)
            prefixes.keep((("d", str(kind), 1.0),), list(range(kind, kind + span.length)), span)
        kv_cache.check_integrity()
        assert sum(span.length for span, _ in running) + prefixes.num_positions == kv_cache.num_held
    prefixes.clear()
    assert sum(span.length for span, _ in running) == kv_cache.num_held
