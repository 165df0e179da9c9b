"""Reads prompts as the router will: features of the base alone, each text once. Knows the base and the cache.

Legend: T tokens, H hidden size of the base.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from engine.model.base import Base
from engine.model.hidden import hidden_states
from router.features import FeatureSettings, token_features
from training.journal import JOURNAL_FOLDER
from training.router.feature_cache import FeatureCache, FeatureKey, compact, open_feature_cache
from training.router.watch import OnPrompt

FEATURES_FILE = "features.sqlite"
BATCH_PROMPTS = 32  # are written together


def feature_settings(base: Base) -> FeatureSettings:
    """The features of section 3.6 of the paper for a base: its middle layer and its last."""
    return FeatureSettings(mid_layer=base.num_layers // 2)


def feature_cache_path(store: Path) -> Path:
    """Where a store keeps the features of its training prompts."""
    return store / JOURNAL_FOLDER / FEATURES_FILE


class FeatureReader:
    """Features of texts, from the cache or from the base."""

    def __init__(self, base: Base, settings: FeatureSettings, cache_path: Path) -> None:
        self.settings = settings
        self._base, self._cache_path = base, cache_path

    def read(self, texts: Sequence[str], on_prompt: OnPrompt = lambda done, total: None) -> list[Tensor]:
        """(T, H) in float16 or float32 for each text. Raises FeaturesInvalid, and EmptyText for a text without tokens.

        What a kill leaves undone is at most BATCH_PROMPTS prompts.
        """
        with open_feature_cache(self._cache_path) as cache:
            found: dict[str, Tensor] = {}
            for start in range(0, len(texts), BATCH_PROMPTS):
                part = texts[start : start + BATCH_PROMPTS]
                self._read_part([text for text in dict.fromkeys(part) if text not in found], cache, found)
                on_prompt(start + len(part), len(texts))
        return [found[text] for text in texts]

    def _read_part(self, texts: Sequence[str], cache: FeatureCache, found: dict[str, Tensor]) -> None:
        computed: dict[FeatureKey, Tensor] = {}
        for text in texts:
            key = self._key(text)
            features = cache.get(key)
            if features is None:
                features = computed[key] = compact(self._compute(text))
            found[text] = features
        cache.put(computed)

    def _compute(self, text: str) -> Tensor:
        states = partial(hidden_states, self._base, mid_layer=self.settings.mid_layer)
        return token_features(text, tokenizer=self._base.tokenizer, hidden_states=states, settings=self.settings)

    def _key(self, text: str) -> FeatureKey:
        """A sha256 over all that the features depend on: the same base in another number format has others."""
        base = [self._base.fingerprint, self._base.base_format, str(self._base.dtype)]
        content = [base, asdict(self.settings), text]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
