"""Features are computed once for what they depend on, and a damaged file is refused by name."""

import dataclasses
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.model.base import Base, load_base
from engine.model.hidden import hidden_states
from router.errors import EmptyText
from router.features import FeatureSettings, token_features
from training.errors import FeaturesInvalid
from training.router.feature_cache import compact, open_feature_cache
from training.router.features import FeatureReader, feature_settings

KEY, OTHER = b"k" * 32, b"o" * 32
TEXTS = ["the quick brown fox", "hello world", "the quick brown fox", "a lazy dog says hello"]


@pytest.fixture(scope="module")
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="float32", device="cpu")


class CountedReader(FeatureReader):
    """Knows how often the base ran."""

    def __init__(self, base: Base, settings: FeatureSettings, path: Path) -> None:
        super().__init__(base, settings, path)
        self.computed: list[str] = []

    def _compute(self, text: str) -> torch.Tensor:
        self.computed.append(text)
        return super()._compute(text)


def test_what_was_put_is_got(tmp_path: Path) -> None:
    half, large = compact(torch.randn(3, 4)), compact(torch.full((2, 4), 1e6))
    with open_feature_cache(tmp_path / "folder" / "features.sqlite") as cache:
        cache.put({KEY: half, OTHER: large})
    with open_feature_cache(tmp_path / "folder" / "features.sqlite") as cache:
        got, got_large = cache.get(KEY), cache.get(OTHER)
        assert cache.get(b"nobody") is None
    assert got is not None
    assert got_large is not None
    assert (got.dtype, got_large.dtype) == (torch.float16, torch.float32)  # 1e6 is more than float16 has
    assert torch.equal(got, half)
    assert torch.equal(got_large, large)


def test_features_are_those_that_serving_reads(base: Base, tmp_path: Path) -> None:
    settings = feature_settings(base)
    read = FeatureReader(base, settings, tmp_path / "features.sqlite").read(TEXTS)
    for text, features in zip(TEXTS, read, strict=True):
        served = token_features(
            text,
            tokenizer=base.tokenizer,
            hidden_states=lambda ids: hidden_states(base, ids, settings.mid_layer),
            settings=settings,
        )
        assert torch.equal(features, served.half())


def test_each_text_is_computed_once_and_never_again(base: Base, tmp_path: Path) -> None:
    settings, path, seen = feature_settings(base), tmp_path / "features.sqlite", list[tuple[int, int]]()
    first = CountedReader(base, settings, path)
    read = first.read(TEXTS, lambda done, total: seen.append((done, total)))
    assert first.computed == list(dict.fromkeys(TEXTS))
    assert seen == [(4, 4)]
    second = CountedReader(base, settings, path)
    assert all(torch.equal(one, other) for one, other in zip(second.read(TEXTS), read, strict=True))
    assert second.computed == []
    assert second.read([TEXTS[1], "something new"])[0].equal(read[1])
    assert second.computed == ["something new"]


def test_another_setting_or_base_has_features_of_its_own(base: Base, tmp_path: Path) -> None:
    settings, path = feature_settings(base), tmp_path / "features.sqlite"
    FeatureReader(base, settings, path).read(TEXTS)
    shorter = CountedReader(base, dataclasses.replace(settings, max_tokens=3), path)
    assert {len(features) for features in shorter.read(TEXTS)} == {3}
    assert len(shorter.computed) == 3
    renamed = CountedReader(dataclasses.replace(base, fingerprint="another"), settings, path)
    renamed.read(TEXTS)
    assert len(renamed.computed) == 3


def test_what_was_computed_before_a_fault_is_kept(base: Base, tmp_path: Path) -> None:
    settings, path = feature_settings(base), tmp_path / "features.sqlite"
    with pytest.raises(EmptyText):
        FeatureReader(base, settings, path).read([*(f"number {i}" for i in range(40)), ""])
    again = CountedReader(base, settings, path)
    again.read([f"number {i}" for i in range(40)])
    assert again.computed == [f"number {i}" for i in range(32, 40)]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(FeaturesInvalid, match=r"features\.sqlite"), open_feature_cache(path):
        pass


def test_damaged_features_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    with open_feature_cache(path) as cache:
        cache.put({KEY: compact(torch.ones(2, 3))})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE features SET content = zeroblob(12)")
    with open_feature_cache(path) as cache, pytest.raises(FeaturesInvalid, match=r"features\.sqlite.*are damaged"):
        cache.get(KEY)


def test_a_file_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(FeaturesInvalid, match="version 7"), open_feature_cache(path):
        pass
