"""Reads benchmark records from local JSONL files. Knows the fields that each kind of benchmark needs, no tasks."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import EvaluationInvalid

Text = Annotated[str, Field(min_length=1)]


class _Record(BaseModel):
    """Other fields than these may stand in a file and are not used."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    question: Text


class ChoiceRecord(_Record):
    """A question with its possible answers; `answer` is the index of the right one."""

    choices: Annotated[list[Text], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]
    source: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of {len(self.choices)} choices")
        return self


class FourChoiceRecord(ChoiceRecord):
    """A question whose answers are shown under the letters A to D."""

    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]


class AnswerRecord(_Record):
    """A question and its answer as text."""

    answer: Text


class FunctionRecord(AnswerRecord):
    """HumanEval: a function's head; `test` defines `check(candidate)`."""

    test: Text
    entry_point: Text


class AssertionRecord(AnswerRecord):
    """MBPP: a task whose solution must pass assertions."""

    tests: Annotated[list[Text], Field(min_length=1)]
    test_setup: str = ""


KINDS: dict[str, type[_Record]] = {
    "choices": ChoiceRecord,
    "four_choices": FourChoiceRecord,
    "answer": AnswerRecord,
    "function": FunctionRecord,
    "assertions": AssertionRecord,
}


def read_records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Every record, with the fields of its kind. Raises EvaluationInvalid that names file, line and field."""
    if not path.is_file():
        raise EvaluationInvalid(f"there is no file {str(path)!r}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(KINDS[kind].model_validate_json(line).model_dump())
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in error.errors())
            raise EvaluationInvalid(f"{path}:{number}: {faults}") from error
    if not records:
        raise EvaluationInvalid(f"file {str(path)!r} has no records")
    return records


def choose_records(records: Sequence[dict[str, Any]], limit: int | None, *, seed: int) -> list[dict[str, Any]]:
    """At most `limit` records by a seeded draw, in the file's order; a smaller draw is part of a larger one.

    Not the first ones: files are often sorted, MMLU's by subject.
    """
    if limit is None or limit >= len(records):
        return list(records)
    drawn = sorted(range(len(records)), key=lambda index: _rank(records[index], seed))[:limit]
    return [records[index] for index in sorted(drawn)]


def _rank(record: dict[str, Any], seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{json.dumps(record, sort_keys=True)}".encode()).digest()
