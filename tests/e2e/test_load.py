"""The load test, short: `python -m tests.benchmarks.load` is the same for ten minutes and 200 clients."""

from pathlib import Path

import pytest

from tests.benchmarks.load import Sizes, run_load

pytestmark = pytest.mark.e2e


def test_under_load_every_stream_is_its_reference_and_sigterm_cuts_none_without_a_word(tmp_path: Path) -> None:
    """A queue shorter than the clients are many, so that some are told to come again."""
    sizes = Sizes(clients=40, seconds=6.0, cases=8, leaving_cases=4, max_queue=16, drain_seconds=2.0)
    result = run_load(tmp_path, sizes)
    assert result["failures"] == []
    load = result["load"]
    assert load["finished"] > 0
    assert load["full"] > 0
    assert load["refused"]
    assert load["hung_up"]
