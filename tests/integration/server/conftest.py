"""A live server a test, made to measure where the defaults do not fit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import LiveServer, run_live_server

ADMIN_KEY = "admin-secret"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """Room for all three domains; an admin key is set, API keys are not."""
    with run_live_server(tmp_path, settings={"server": {"admin_key": ADMIN_KEY}}) as live:
        yield live
        live.cache.check_integrity()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One for all tests of a file that leave no trace in it."""
    with run_live_server(tmp_path_factory.mktemp("shared")) as live:
        yield live
        assert live.service.admission.admitted == 0
