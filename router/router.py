"""Routes one text: features, scores, mix. Knows the router's parts; does not know stores, caches or requests.

Not thread-safe in itself: call it where `hidden_states` may be called, which is the thread that owns the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from router.checkpoint import RouterCheckpoint
from router.errors import ScoresNotFinite
from router.features import FeatureSettings, HiddenStates, Tokenizer, pad_features, token_features
from router.network import MetaRouter
from router.policy import RoutingPolicy


@dataclass(frozen=True, slots=True)
class Route:
    """The raw scores of every domain, the mix made of them, and whether no domain knew the prompt."""

    scores: Mapping[str, float]
    mix: Mapping[str, float]
    gap: bool


class Router:
    """Scores a text and applies the policy. The same text gives the same route, bit for bit, on the same device."""

    def __init__(
        self,
        *,
        network: MetaRouter,
        settings: FeatureSettings,
        policy: RoutingPolicy,
        tokenizer: Tokenizer,
        hidden_states: HiddenStates,
    ) -> None:
        """`hidden_states` must give the layer `settings.mid_layer`. The network stays on its device, in eval mode."""
        self.settings = settings
        self.policy = policy
        self._network = network.eval()
        self._tokenizer = tokenizer
        self._hidden_states = hidden_states

    @classmethod
    def from_checkpoint(
        cls, checkpoint: RouterCheckpoint, *, tokenizer: Tokenizer, hidden_states: HiddenStates
    ) -> "Router":
        return cls(
            network=checkpoint.network,
            settings=checkpoint.settings,
            policy=checkpoint.policy,
            tokenizer=tokenizer,
            hidden_states=hidden_states,
        )

    @property
    def domains(self) -> tuple[str, ...]:
        return self._network.domains

    def route(self, text: str) -> Route:
        """Runs the base and the network once. EmptyText without tokens, ScoresNotFinite if a score is no number."""
        scores = self._score(text)
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if broken:
            raise ScoresNotFinite(f"the scores of {broken} are not finite")
        return Route(scores=scores, mix=self.policy.mix_from_scores(scores), gap=self.policy.is_gap(scores))

    @torch.inference_mode()
    def _score(self, text: str) -> dict[str, float]:
        features = token_features(
            text, tokenizer=self._tokenizer, hidden_states=self._hidden_states, settings=self.settings
        )
        batch, mask = pad_features([features.to(self._network.device)])
        scores: list[float] = self._network.scores(batch, mask).squeeze(0).tolist()
        return dict(zip(self.domains, scores, strict=True))
