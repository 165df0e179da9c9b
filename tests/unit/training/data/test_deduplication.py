"""The first of the same records stays."""

from hypothesis import given
from hypothesis import strategies as st

from training.data.deduplication import deduplicate
from training.data.records import Record, SourcedRecord, SourceKey, normalise_text

TEXTS = st.sampled_from(["a", "A ", "a  b", "a\nB", "c"])
RECORDS = st.lists(st.builds(Record, TEXTS, TEXTS), max_size=12)


def sourced(domain: str, records: list[Record]) -> list[SourcedRecord]:
    return [SourcedRecord(r, f"{domain}:{i}", SourceKey(domain, 0)) for i, r in enumerate(records)]


@given(RECORDS, RECORDS)
def test_it_does_what_comparing_all_pairs_does(first: list[Record], second: list[Record]) -> None:
    pools = {"first": sourced("first", first), "second": sourced("second", second)}
    expected: dict[str, list[SourcedRecord]] = {"kept": [], "repeated": [], "elsewhere": []}
    everything = [item for pool in pools.values() for item in pool]
    for index, item in enumerate(everything):
        same = [
            other
            for other in everything[:index]
            if normalise_text(other.prompt) == normalise_text(item.prompt)
            and normalise_text(other.record.output) == normalise_text(item.record.output)
        ]
        fate = "kept" if not same else "repeated" if same[0].source == item.source else "elsewhere"
        expected[fate].append(item)
    result = deduplicate(pools)
    for fate, items in expected.items():
        by_domain = getattr(result, fate)
        assert list(by_domain) == ["first", "second"]
        assert [item for pool in by_domain.values() for item in pool] == items


def test_one_prompt_with_two_answers_is_two_records() -> None:
    pool = sourced("a", [Record("q", "yes"), Record("q", "no"), Record("q", "Yes")])
    assert [item.record.output for item in deduplicate({"a": pool}).kept["a"]] == ["yes", "no"]
