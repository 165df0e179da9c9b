"""Decides which domains answer, given the router's scores. Knows numbers and names; no network, no store."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """The constants that turn scores into a mix; they travel in the router file.

    The floor domain gets at least `floor` wherever it exists; a domain is active if its weight is above `threshold`.
    A prompt whose scores are all below `gap_threshold` is a capability gap: training calibrates that number by itself.
    """

    floor_domain: str = "chat"
    floor: float = 0.20
    threshold: float = 0.12
    gap_threshold: float = 0.12

    def __post_init__(self) -> None:
        for name in ("floor", "threshold", "gap_threshold"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {value}")

    def mix_from_scores(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The active domains with their weights, in the order of `scores`. Weights are not normalised."""
        weights = dict(scores)
        if self.floor_domain in weights:
            weights[self.floor_domain] = max(weights[self.floor_domain], self.floor)
        return {name: weight for name, weight in weights.items() if weight > self.threshold}

    def is_gap(self, scores: Mapping[str, float]) -> bool:
        """True if every raw score is below its threshold: no domain knows this prompt, whatever the floor adds."""
        return all(score < self.gap_threshold for score in scores.values())
