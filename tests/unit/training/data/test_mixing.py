"""Caps, weights and limits."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.mixing import mix_sources, share_out
from training.data.records import Record, SourcedRecord, SourceKey
from training.recipe import DomainSection, SourceSection

SOURCES = st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 50)), min_size=1, max_size=6)


@given(SOURCES, st.integers(0, 200))
def test_shares_add_up_and_none_gives_more_than_it_has(sources: list[tuple[float, int]], total: int) -> None:
    weights, available = [w for w, _ in sources], [n for _, n in sources]
    given_out = share_out(total, weights, available)
    assert sum(given_out) == min(total, sum(available))
    assert all(0 <= number <= there for number, there in zip(given_out, available, strict=True))


@given(SOURCES, st.integers(0, 200))
def test_shares_are_within_one_of_the_level_at_which_all_sources_together_give_the_total(
    sources: list[tuple[float, int]], total: int
) -> None:
    """At level h a source gives h times its weight, or all it has: so none dry is in proportion, within one."""
    weights, available = [Fraction(w) for w, _ in sources], [n for _, n in sources]
    total = min(total, sum(available))

    def at(level: Fraction) -> list[Fraction]:
        return [min(Fraction(n), level * w) for w, n in zip(weights, available, strict=True)]

    # The level lies behind the last source that runs dry before the total is reached.
    dry = [Fraction(0), *(n / w for w, n in zip(weights, available, strict=True))]
    below = max(level for level in dry if sum(at(level)) <= total)
    flowing = sum(w for w, n in zip(weights, available, strict=True) if n / w > below)
    level = below + ((total - sum(at(below))) / flowing if flowing else 0)
    given_out = share_out(total, [w for w, _ in sources], available)
    assert all(abs(number - share) < 1 for number, share in zip(given_out, at(level), strict=True))


@pytest.mark.parametrize(
    ("total", "weights", "available", "shares"),
    [
        (100, [3, 1], [1000, 1000], [75, 25]),
        (100, [3, 1], [30, 1000], [30, 70]),
        (100, [3, 1, 1], [30, 1000, 1000], [30, 35, 35]),
        (10, [1, 1, 1], [100, 100, 100], [4, 3, 3]),
        (100, [1, 1], [10, 10], [10, 10]),
        (3, [1, 1000], [5, 5], [0, 3]),
    ],
)
def test_shares_by_hand(total: int, weights: list[float], available: list[int], shares: list[int]) -> None:
    assert share_out(total, weights, available) == shares


def pool(domain: str, *counts: int, origin: str | None = None, first: int = 0) -> list[SourcedRecord]:
    """Records of a domain's sources, `counts` each."""
    return [
        SourcedRecord(Record(f"{domain} {source} {i + first}", "x"), "f:1", SourceKey(origin or domain, source))
        for source, count in enumerate(counts)
        for i in range(count)
    ]


def domain(name: str, *sources: dict[str, float], max_records: int | None = None) -> DomainSection:
    sections = tuple(SourceSection.model_validate({"file": "f", **source}) for source in sources)
    return DomainSection(name=name, sources=sections, max_records=max_records)


def of_source(records: list[SourcedRecord]) -> Counter[SourceKey]:
    return Counter(item.source for item in records)


def test_sources_share_a_domains_limit_by_weight_under_their_caps() -> None:
    records = pool("a", 100, 100, 100)
    section = domain("a", {"weight": 2}, {"weight": 1}, {"weight": 1, "cap": 5}, max_records=80)
    mixed = mix_sources({"a": records}, [section], seed=1)
    assert of_source(mixed.kept["a"]) == {SourceKey("a", 0): 50, SourceKey("a", 1): 25, SourceKey("a", 2): 5}
    assert [item for item in records if item in mixed.kept["a"]] == mixed.kept["a"]  # in their former order
    assert len(mixed.left_out["a"]) == 220


def test_a_cap_counts_what_was_moved_into_another_domain_too() -> None:
    pools = {"a": pool("a", 10), "b": [*pool("b", 10), *pool("moved", 10, origin="a")]}
    mixed = mix_sources(pools, [domain("a", {"cap": 6}), domain("b", {})], seed=1)
    assert of_source(mixed.kept["a"] + mixed.kept["b"]) == {SourceKey("a", 0): 6, SourceKey("b", 0): 10}


def test_the_choice_is_the_seeds_not_the_orders() -> None:
    records, section = pool("a", 50), domain("a", {"cap": 10})
    chosen = [
        {item.prompt for item in mix_sources({"a": items}, [section], seed=seed).kept["a"]}
        for items, seed in ((records, 1), (records[::-1], 1), (records, 2))
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_without_caps_and_limits_everything_stays() -> None:
    records = pool("a", 5, 7)
    mixed = mix_sources({"a": records}, [domain("a", {}, {})], seed=1)
    assert mixed.kept == {"a": records}
    assert mixed.left_out == {"a": []}
