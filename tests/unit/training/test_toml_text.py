"""Settings written as TOML read back as they were."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.toml_text import as_toml

KEYS = st.text("abz_-09", min_size=1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_written_reads_back(content: dict[str, Any]) -> None:
    assert tomllib.loads(as_toml(content)) == content


def test_sections_stand_apart() -> None:
    text = as_toml({"seed": 1, "stack": {"alpha": 16.0, "kind": "moe_lora"}, "domains": [{"name": "a", "soft": False}]})
    assert text == ('seed = 1\ndomains = [{name = "a", soft = false}]\n\n[stack]\nalpha = 16.0\nkind = "moe_lora"\n')


def test_a_value_without_a_form_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        as_toml({"stack": {"rank": None}})
