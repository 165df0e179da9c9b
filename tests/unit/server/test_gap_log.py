"""The file of uncovered prompts is bounded, private, and the only place where they are written."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigInvalid
from server.gap_log import GapLog

SCORES = {"chat": 0.03, "math": 0.1}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep_all(path: Path, prompts: list[str], *, max_bytes: int) -> None:
    log = GapLog(path, max_bytes=max_bytes)
    for prompt in prompts:
        log.keep(prompt, SCORES)
    log.close()


def test_a_prompt_is_a_line_with_its_time_and_scores(tmp_path: Path) -> None:
    prompts = ["two\nlines", "Gr\u00fc\u00dfe \ud83d"]  # the last half of a pair that has no UTF-8 of its own
    keep_all(tmp_path / "gaps.jsonl", prompts, max_bytes=4096)
    kept = lines(tmp_path / "gaps.jsonl")
    assert [entry["prompt"] for entry in kept] == prompts
    assert [entry["scores"] for entry in kept] == [SCORES, SCORES]
    assert all(entry.keys() == {"time", "prompt", "scores"} and entry["time"].endswith("+00:00") for entry in kept)


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    keep_all(tmp_path / "gaps.jsonl", ["one"], max_bytes=4096)
    assert (tmp_path / "gaps.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_full_file_is_put_aside_and_the_one_before_forgotten(tmp_path: Path) -> None:
    prompts = [f"prompt {i:03}" for i in range(100)]
    keep_all(tmp_path / "gaps.jsonl", prompts, max_bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"gaps.jsonl", "gaps.jsonl.1"}
    kept = [entry["prompt"] for name in ("gaps.jsonl.1", "gaps.jsonl") for entry in lines(tmp_path / name)]
    assert kept == prompts[-len(kept) :]
    assert len(kept) > 8
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_a_restarted_server_goes_on_behind_the_last_line(tmp_path: Path) -> None:
    for prompt in ("one", "two"):
        keep_all(tmp_path / "gaps.jsonl", [prompt], max_bytes=4096)
    assert [entry["prompt"] for entry in lines(tmp_path / "gaps.jsonl")] == ["one", "two"]


def test_a_prompt_larger_than_the_file_is_refused_without_a_word_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        keep_all(tmp_path / "gaps.jsonl", ["one", "secret " * 100, "two"], max_bytes=500)
    assert [entry["prompt"] for entry in lines(tmp_path / "gaps.jsonl")] == ["one", "two"]
    assert "gap prompt not kept bytes=" in caplog.text
    assert "secret" not in caplog.text


def test_a_disk_that_fails_costs_a_warning_without_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "gaps.jsonl"
    path.parent.mkdir()
    log = GapLog(path, max_bytes=4096)
    path.unlink()
    path.parent.rmdir()
    log.keep("secret", SCORES).result()
    log.close()
    assert "gap prompt not kept path=" in caplog.text
    assert "secret" not in caplog.text


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"server\.gap_log: '.*nowhere.*' cannot be written"):
        GapLog(tmp_path / "nowhere" / "gaps.jsonl", max_bytes=4096)
