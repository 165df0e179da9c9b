"""What an evaluation is asked to measure, checked for sense. Knows names and numbers only."""

from dataclasses import dataclass
from pathlib import Path

from training.errors import EvaluationInvalid
from training.evaluating.modes import MODES, Mode


@dataclass(frozen=True, slots=True)
class Plan:
    """Raises EvaluationInvalid for what cannot be meant."""

    modes: tuple[Mode, ...] = MODES
    held_out: bool = True
    data: Path | None = None  # the folder of the benchmarks' files; None: no benchmarks
    tasks: tuple[str, ...] = ()  # none named: all that may run
    limit: int | None = None  # records of each domain and documents of each task, at most
    run_code: bool = False  # whether tasks may run what the model wrote
    chat_template: bool = False  # whether benchmarks ask in the base's chat template

    def __post_init__(self) -> None:
        if self.tasks and self.data is None:
            raise EvaluationInvalid(f"tasks {list(self.tasks)} need the folder of their files: --data")
        if not self.held_out and self.data is None:
            raise EvaluationInvalid("nothing to measure: neither held-out loss nor benchmarks, which need --data")
        if self.data is not None and not self.benchmark_modes:
            raise EvaluationInvalid(
                "mode 'oracle' is defined for held-out loss only: a benchmark's score is nothing to search by"
            )

    @property
    def benchmark_modes(self) -> tuple[Mode, ...]:
        """The modes that benchmarks can be run in."""
        return tuple(mode for mode in self.modes if mode != "oracle")
