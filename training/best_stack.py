"""The guard of the inner loop: keeps the best weights seen and says when to stop. Knows losses, not data."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from engine.model.training_form import MoeLoraStack
from training.errors import TrainingDiverged


@dataclass(slots=True)
class BestStack:
    """Keeps the best weights seen and says when to stop (Brainstacks paper, section 3.3: BestStackCallback)."""

    patience: int
    spike: float
    best_loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    bad_evaluations: int = 0

    def observe(self, loss: float, stack: MoeLoraStack) -> str | None:
        """Takes one validation loss; names why training should stop: not finite, spike or patience."""
        if math.isfinite(loss) and loss < self.best_loss:
            self.best_loss, self.bad_evaluations = loss, 0
            self.weights = {name: value.detach().clone() for name, value in stack.state_dict().items()}
            return None
        self.bad_evaluations += 1
        if not math.isfinite(loss):
            return "not finite"
        if loss > self.best_loss + self.spike:
            return "spike"
        return "patience" if self.bad_evaluations >= self.patience else None

    def restore(self, stack: MoeLoraStack) -> None:
        """Puts the best weights back. Raises TrainingDiverged if no loss was finite."""
        if not self.weights:
            raise TrainingDiverged("no validation loss was finite; the stack is not kept")
        stack.load_state_dict(self.weights)
