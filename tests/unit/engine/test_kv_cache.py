"""Spans never overlap, never leak, and fit wherever there is room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_cache import KvCache, KvSpan


@given(st.lists(st.one_of(st.integers(1, 40), st.integers(-8, -1)), max_size=60))
def test_any_history_keeps_spans_apart_and_gives_everything_back(history: list[int]) -> None:
    cache, held = KvCache(100), list[KvSpan]()
    for action in history:  # positive: reserve that many; negative: release one
        if action > 0:
            span = cache.reserve(action)
            if span is not None:
                assert span.length == action
                held.append(span)
        elif held:
            cache.release(held.pop(action % len(held)))
        cache.check_integrity()
        assert cache.num_held == sum(span.length for span in held)
    for span in held:
        cache.release(span)
    assert cache.reserve(100) == KvSpan(0, 100)


def test_a_gap_is_used_again_and_a_full_cache_says_so() -> None:
    cache = KvCache(10)
    first, second = cache.reserve(4), cache.reserve(6)
    assert first is not None
    assert second is not None
    assert cache.reserve(1) is None
    cache.release(first)
    assert cache.reserve(5) is None
    assert cache.reserve(4) == first


def test_a_span_shrinks_from_its_end() -> None:
    cache = KvCache(10)
    first = cache.reserve(8)
    assert first is not None
    left = cache.shrink(first, 3)
    assert left == KvSpan(0, 3)
    assert cache.reserve(7) == KvSpan(3, 7)
    cache.release(left)
    cache.check_integrity()


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        KvCache(0)
