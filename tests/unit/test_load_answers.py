"""The judge of the load test sees what it is there to see."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.benchmarks.load_answers import Case, StreamedAnswer

CASE = Case(
    request={}, text="one two three", finish_reason="stop", prompt_tokens=5, completion_tokens=3, mix={"math": 1.0}
)


def chunk(text: str | None = None, *, reason: str | None = None, answer: str = "a", **more: Any) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"id": answer, "choices": [{"delta": delta, "finish_reason": reason}], **more})


END = chunk(reason="stop", brainstacks={"mix": {"math": 1.0}})
USAGE = json.dumps({"id": "a", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
WHOLE = (chunk(""), chunk("one"), chunk(" two"), chunk(" three"), END, USAGE, "[DONE]")


def without(index: int) -> Sequence[str]:
    return [*WHOLE[:index], *WHOLE[index + 1 :]]


def difference(events: Sequence[str]) -> str | None:
    answer = StreamedAnswer()
    for event in events:
        answer.take(event)
    return answer.difference(CASE)


def test_a_whole_stream_is_its_reference() -> None:
    assert difference(WHOLE) is None


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (without(2), "text 'one three'"),
        ([*WHOLE[:3], WHOLE[2], *WHOLE[3:]], "text 'one two two three'"),
        (without(4), "finish reasons []"),
        (without(5), "completion tokens None"),
        (without(6), "ends 0"),
        ([*WHOLE, chunk("!")], "behind the end"),
        ([*WHOLE[:2], chunk(" two", answer="b"), *WHOLE[3:]], "another answer"),
        ([*WHOLE[:5], chunk("!"), *WHOLE[5:]], "behind the finish reason"),
        ([*WHOLE[:4], chunk(reason="stop", brainstacks={"mix": {}}), *WHOLE[5:]], "mix {}"),
        ([*WHOLE[:3], json.dumps({"error": {"code": "shutting_down"}})], "shutting_down"),
    ],
)
def test_what_is_lost_doubled_or_foreign_is_named(events: Sequence[str], words: str) -> None:
    found = difference(events)
    assert found is not None
    assert words in found
