"""Our import names are short; another distribution that ships one of them would shadow ours."""

from importlib.metadata import packages_distributions

import pytest

OURS = ["server", "engine", "router", "stack_store", "training"]


@pytest.mark.parametrize("name", OURS)
def test_no_other_distribution_ships_our_import_name(name: str) -> None:
    assert set(packages_distributions().get(name, ["brainstacks"])) == {"brainstacks"}
