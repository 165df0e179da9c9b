"""Facts about benchmark files: what is wrong is named by file, line and field, and a draw is fair and repeatable."""

import json
from pathlib import Path

import pytest

from training.errors import EvaluationInvalid
from training.evaluating.benchmark_data import KINDS, choose_records, read_records

CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 1, "source": "s", "other": 5}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_have_the_fields_of_their_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CHOICE)
    assert read_records(path, "choices") == [{"question": "q", "choices": ["a", "b"], "answer": 1, "source": "s"}]


@pytest.mark.parametrize(
    ("kind", "record", "fault"),
    [
        ("choices", {**CHOICE, "answer": 2}, "answer 2 is none of 2 choices"),
        ("choices", {**CHOICE, "answer": "1"}, "answer: "),
        ("choices", {**CHOICE, "choices": ["a", ""]}, r"choices\.1: "),
        ("choices", {"question": "q"}, "choices: Field required"),
        ("choices", {**CHOICE, "question": ""}, "question: "),
        ("four_choices", CHOICE, "choices: List should have at least 4"),
        ("answer", {"question": "q", "answer": 7}, "answer: "),
        ("function", {"question": "q", "answer": "a", "test": "t"}, "entry_point: "),
        ("assertions", {"question": "q", "answer": "a", "tests": []}, "tests: "),
        ("choices", "text", "line: "),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, kind: str, record: object, fault: str) -> None:
    path = write(tmp_path / "a.jsonl", *([CHOICE] if kind == "choices" else []), record)
    number = 2 if kind == "choices" else 1
    with pytest.raises(EvaluationInvalid, match=rf"a\.jsonl:{number}: .*{fault}"):
        read_records(path, kind)


def test_a_missing_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInvalid, match=r"no file '.*b\.jsonl'"):
        read_records(tmp_path / "b.jsonl", "choices")
    with pytest.raises(EvaluationInvalid, match=r"a\.jsonl' has no records"):
        read_records(write(tmp_path / "a.jsonl"), "choices")


def test_a_draw_is_seeded_nested_and_in_the_files_order() -> None:
    records = [{"question": f"q{number}"} for number in range(100)]
    drawn = {limit: choose_records(records, limit, seed=1) for limit in (10, 30, 100, 200)}
    assert drawn[100] == drawn[200] == choose_records(records, None, seed=1) == records
    assert len(drawn[10]) == 10
    assert [record for record in records if record in drawn[10]] == drawn[10] != records[:10]
    assert all(record in drawn[30] for record in drawn[10])
    assert choose_records(records, 10, seed=2) != drawn[10]
    shuffled = records[::-1]
    assert sorted(map(str, choose_records(shuffled, 10, seed=1))) == sorted(map(str, drawn[10]))


def test_every_kind_is_known_by_its_name() -> None:
    assert set(KINDS) == {"choices", "four_choices", "answer", "function", "assertions"}
