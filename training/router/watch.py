"""Says who is told how far a router's training is. Knows counts only."""

from collections.abc import Callable
from dataclasses import dataclass

from training.router.learning import RouterProgress

OnPrompt = Callable[[int, int], None]  # features done, of all
OnStep = Callable[[str, RouterProgress], None]  # which router, and how far it is


@dataclass(frozen=True, slots=True)
class Watch:
    """Nobody, unless they are named."""

    on_prompt: OnPrompt = lambda done, total: None
    on_step: OnStep = lambda name, progress: None
