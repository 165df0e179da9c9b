"""Several processes that train one stack together, one a device. Knows how work is shared, not what the work is.

`accelerate launch` starts them; a process that was started alone is a company of one. Every worker holds all of the
stack and makes the same optimiser step; only the passes of a step, and the batches of an evaluation, are shared out.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

Work = TypeVar("Work")


class Workers:
    """This process's view of the company it works in."""

    def __init__(self) -> None:
        self._state = PartialState()

    @property
    def device(self) -> torch.device:
        """The device of this worker."""
        return self._state.device

    @property
    def is_first(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return bool(self._state.is_main_process)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    def mine(self, work: Sequence[Work]) -> Sequence[Work]:
        """This worker's share: every count-th piece."""
        return work[self._state.process_index :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers, where the values were."""
        if self.count == 1:
            return values
        summed = values.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.to(values.device)

    def wait(self) -> None:
        """Returns when every worker is here: what the first wrote before is there for all after."""
        self._state.wait_for_everyone()
