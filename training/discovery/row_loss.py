"""What one answer cost under one mix. Knows numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed loss in nats over an answer's tokens, and how many they are."""

    loss_sum: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per answer token."""
        return self.loss_sum / self.tokens
