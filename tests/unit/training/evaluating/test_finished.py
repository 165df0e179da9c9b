"""Facts about finished measurements: none is made twice, none is lost but the batch that a kill hit."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished, Work, content_key

KEYS = [content_key("square", number) for number in (3, 1, 2, 3, 1)]
VALUES = [9, 1, 4, 9, 1]


def squares(asked: list[list[int]], *, fail_at: int | None = None) -> Work:
    """Work that remembers what it was asked for, one index a batch."""

    def work(missing: list[int]) -> Iterator[Mapping[int, int]]:
        asked.append(missing)
        for number, index in enumerate(missing):
            if number == fail_at:
                raise KeyboardInterrupt
            yield {index: VALUES[index]}

    return work


def test_values_come_in_order_and_equal_keys_are_worked_on_once(tmp_path: Path) -> None:
    asked: list[list[int]] = []
    progress: list[tuple[int, int]] = []
    with Finished(tmp_path / "folder" / "finished.sqlite") as finished:
        assert finished.complete(KEYS, squares(asked), lambda *at: progress.append(at)) == VALUES
        assert finished.complete(KEYS[:2], squares(asked)) == VALUES[:2]
    assert asked == [[0, 1, 2]]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_run_goes_on_behind_a_kill(tmp_path: Path) -> None:
    asked: list[list[int]] = []
    with Finished(tmp_path / "f.sqlite") as finished, pytest.raises(KeyboardInterrupt):
        finished.complete(KEYS, squares(asked, fail_at=2))
    with Finished(tmp_path / "f.sqlite") as finished:
        assert finished.complete(KEYS, squares(asked)) == VALUES
    assert asked == [[0, 1, 2], [2]]


def test_values_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, "caf\u00e9 \U0001f600\n", [True, None], {"a": 1.5}]
    keys = [content_key("value", index) for index in range(len(values))]
    with Finished(tmp_path / "f.sqlite") as finished:
        finished.complete(keys, lambda missing: [dict(enumerate(values))])
    with Finished(tmp_path / "f.sqlite") as finished:
        assert finished.complete(keys, lambda missing: pytest.fail("worked again")) == values


def test_more_keys_than_one_statement_takes(tmp_path: Path) -> None:
    keys = [content_key("many", number) for number in range(1203)]
    with Finished(tmp_path / "f.sqlite") as finished:
        finished.complete(keys, lambda missing: [{index: index for index in missing}])
        assert finished.complete(keys[::-1], lambda missing: pytest.fail("worked again")) == list(range(1202, -1, -1))


def test_keys_tell_kinds_and_contents_apart() -> None:
    keys = {
        content_key("a", 1),
        content_key("b", 1),
        content_key("a", [1]),
        content_key("a", "1"),
        content_key("a", 1, 1),
    }
    assert len(keys) == 5
    assert content_key("a", 1) == content_key("a", 1)


@pytest.mark.parametrize(
    "content", [b"no database at all, and longer than a header of sqlite is" * 9, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.sqlite").write_bytes(content)
    with pytest.raises(EvaluationInvalid, match=r"f\.sqlite"):
        Finished(tmp_path / "f.sqlite")


def test_a_place_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.sqlite").mkdir()
    with pytest.raises(EvaluationInvalid, match=r"f\.sqlite: cannot keep finished measurements"):
        Finished(tmp_path / "f.sqlite")
