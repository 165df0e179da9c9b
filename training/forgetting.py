"""Measures what later domains did to earlier ones: the forgetting matrix. Knows stacks and losses, not how they came.

Modes: `isolated` has the domain's own stacks alone, `ungated` every domain's at weight 1 (the paper's figure 4),
`routed` the mix that the router's policy makes of the right label: the domain itself, and the floor domain at its
floor.
"""

from collections.abc import Mapping, Sequence

from engine.model.base import Base
from engine.model.inject import injected
from engine.model.moe_lora import StackPack
from engine.model.training_form import TrainingDeltas
from router.policy import RoutingPolicy
from training.context import Rounds, pack_of
from training.data.examples import Example
from training.evaluation import mean_answer_loss
from training.reports import ForgettingReport
from training.workers import Workers


class Examiner:
    """Measures compositions of frozen domains on held-out examples, always in the same batches."""

    def __init__(
        self, base: Base, held_out: Mapping[str, Sequence[Example]], *, max_tokens: int, workers: Workers
    ) -> None:
        self._base, self._held_out = base, held_out
        self._max_tokens, self._workers = max_tokens, workers

    def loss(self, domain: str, pack: StackPack | None, weights: Sequence[float] | None = None) -> float:
        """Held-out loss of a domain with these frozen stacks, each at its weight or at 1; None is the base alone."""
        deltas = TrainingDeltas()
        deltas.use_frozen(pack, weights)
        with injected(self._base.sites, deltas):
            return mean_answer_loss(
                self._base, deltas, self._held_out[domain], max_tokens=self._max_tokens, workers=self._workers
            )

    def losses_by_mode(self, frozen: Mapping[str, Rounds], policy: RoutingPolicy) -> dict[str, dict[str, float]]:
        """mode -> domain -> loss, of every frozen domain."""
        everything = pack_of(frozen, frozen)
        return {
            "isolated": {name: self.loss(name, pack_of([name], frozen)) for name in frozen},
            "ungated": {name: self.loss(name, everything) for name in frozen},
            "routed": {name: self._routed_loss(name, frozen, policy) for name in frozen},
        }

    def _routed_loss(self, domain: str, frozen: Mapping[str, Rounds], policy: RoutingPolicy) -> float:
        mix = policy.mix_from_scores({name: float(name == domain) for name in frozen})
        weights = [mix[name] for name in mix for _ in frozen[name]]
        return self.loss(domain, pack_of(mix, frozen), weights)


def add_row(
    report: ForgettingReport | None, domain: str, base_loss: float, losses: Mapping[str, Mapping[str, float]]
) -> ForgettingReport:
    """The report with the losses after one more domain; what it said of that domain before is replaced."""
    report = report or ForgettingReport(base={}, after={})
    return ForgettingReport({**report.base, domain: base_loss}, {**report.after, domain: losses})
