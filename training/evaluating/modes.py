"""Names the modes of evaluation and the comparisons between them. Knows names only."""

from collections.abc import Sequence
from typing import Literal, get_args

from training.errors import EvaluationInvalid

Mode = Literal["base", "label", "ungated", "routed", "oracle"]
MODES: tuple[Mode, ...] = get_args(Mode)
COMPARED_WITH: tuple[Mode, ...] = ("base", "ungated", "label", "oracle")  # what routed is tested against


def read_modes(names: Sequence[str]) -> tuple[Mode, ...]:
    """The named modes in their usual order, each once; none named means all. Raises EvaluationInvalid by name."""
    unknown = [name for name in names if name not in MODES]
    if unknown:
        raise EvaluationInvalid(f"there is no mode {unknown[0]!r}; the modes are {list(MODES)}")
    return tuple(mode for mode in MODES if not names or mode in names)
