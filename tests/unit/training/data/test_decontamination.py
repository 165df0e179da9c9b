"""Keywords: the score, who is moved, who is dropped."""

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.decontamination import compile_keywords, decontaminate, keyword_scores
from training.data.records import Record, SourcedRecord, SourceKey
from training.errors import RecipeInvalid
from training.recipe import DomainSection

WORDS = {
    "chat": ("hello", "thanks"),
    "code": (r"\bdef\b", "import", r"print\("),
    "medical": ("dose", "patient", "fever"),
}


def domains(words: Mapping[str, tuple[str, ...]]) -> list[DomainSection]:
    return [DomainSection(name=name, files=("x",), keywords=patterns) for name, patterns in words.items()]


def sorted_out(domain: str, output: str) -> str:
    """kept, dropped, or the domain that a record of `domain` goes to."""
    item = SourcedRecord(Record("?", output), "x:1", SourceKey(domain, 0))
    pools = {name: [item] if name == domain else [] for name in WORDS}
    result = decontaminate(pools, compile_keywords(domains(WORDS)))
    where = [name for name, kept in result.kept.items() if item in kept]
    moved = [to for targets in result.moved.values() for to, items in targets.items() if item in items]
    dropped = [name for name, items in result.dropped.items() if item in items]
    assert len(where) + len(dropped) == 1
    assert moved == [name for name in where if name != domain]
    return "dropped" if dropped else "kept" if where == [domain] else where[0]


@pytest.mark.parametrize(
    ("domain", "output", "fate"),
    [
        ("chat", "nothing at all", "kept"),
        ("chat", "take one dose", "kept"),  # 1 against 0: one word is chance
        ("chat", "the patient takes one dose", "medical"),  # 2 against 0
        ("chat", "hello patient, take one dose", "kept"),  # 2 against 1
        ("chat", "hello patient, one dose against fever", "medical"),  # 3 against 1
        ("chat", "def dose(patient): import fever", "medical"),  # 3, and code has 2
        ("chat", "def import: patient dose", "dropped"),  # 2 and 2
        ("code", "import patient dose fever", "medical"),
        ("medical", "import patient dose", "kept"),
        ("chat", "dose dose dose dose", "kept"),  # a pattern counts once
    ],
)
def test_a_plain_lead_moves_a_record_and_a_tie_of_others_drops_it(domain: str, output: str, fate: str) -> None:
    assert sorted_out(domain, output) == fate


def test_prompt_and_answer_count_case_does_not_and_a_pattern_given_twice_is_one() -> None:
    keywords = compile_keywords(domains({"a": ("Alpha", "Alpha", "beta"), "b": ("gamma",)}))
    assert keyword_scores(Record("ALPHA?", "none", "Beta"), keywords) == {"a": 2, "b": 0}
    assert keyword_scores(Record("none", "gamma"), keywords) == {"a": 0, "b": 1}


PATTERNS = (
    "is",
    r"\bis\b",
    r"\bis",
    r"is\b",
    r"\Bis",
    r"is\B",
    "k",
    r"\bsum of\b",
    "Sum ",
    r"x =",
    r"a.c",
    r"[a-f]{2}",
)
TEXT = st.text(st.sampled_from("isISkKaAfcxsumof =\n_1é\u017f\u0131\u0130\u212a\u0307"), max_size=30)


@given(TEXT, TEXT)
def test_the_quick_search_finds_what_the_plain_one_finds(prompt: str, output: str) -> None:
    keywords = compile_keywords(domains({pattern.encode().hex(): (pattern,) for pattern in PATTERNS}))
    scores = keyword_scores(Record(prompt, output), keywords)
    for pattern in PATTERNS:
        found = re.search(pattern, f"{prompt}\n{output}", re.IGNORECASE) is not None
        assert scores[pattern.encode().hex()] == found


def test_a_pattern_that_does_not_compile_names_domain_and_pattern() -> None:
    with pytest.raises(RecipeInvalid, match=r"'\(open' of domain 'code'"):
        compile_keywords(domains({"code": ("fine", "(open")}))
