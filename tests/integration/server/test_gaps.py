"""Prompts that no domain covers are counted each time, and kept once if somebody asked for it."""

import json
import logging
from pathlib import Path

import pytest

from tests.servers import run_live_server


def prompts_in(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_a_gap_is_counted_each_time_and_kept_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "gaps.jsonl"
    with caplog.at_level(logging.INFO), run_live_server(tmp_path, settings={"server": {"gap_log": log}}) as server:
        for text in ("unheard of", "unheard of", "math=0.9", "unheard of", "math=0.05 as well"):
            assert server.chat(text).status_code == 200
        assert server.metric("brainstacks_capability_gap_total") == 4
        assert len(server.router.texts) == 3  # the rest came from the cache
    assert prompts_in(log) == ["unheard of", "math=0.05 as well"]
    scores = json.loads(log.read_text().splitlines()[1])["scores"]
    assert scores == {"chat": 0.01, "code": 0.01, "math": 0.05}
    assert "unheard of" not in caplog.text


def test_what_is_only_shown_or_has_a_mix_of_its_own_is_not_kept(tmp_path: Path) -> None:
    log = tmp_path / "gaps.jsonl"
    with run_live_server(tmp_path, settings={"server": {"gap_log": log}}) as server:
        with server.client() as client:
            assert client.post("/v1/route", json={"prompt": "unheard of"}).json()["gap"] is True
        server.chat("never said", model="tiny:math")
        server.chat("never said", model="tiny:base")
        assert server.metric("brainstacks_capability_gap_total") == 0
        server.chat("unheard of")
    assert prompts_in(log) == ["unheard of"]


def test_nothing_is_kept_unless_it_is_asked_for(tmp_path: Path) -> None:
    with run_live_server(tmp_path) as server:
        server.chat("unheard of")
        assert server.metric("brainstacks_capability_gap_total") == 1
    assert not list(tmp_path.glob("*.jsonl"))
