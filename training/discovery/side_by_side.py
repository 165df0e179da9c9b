"""Runs many passes of one base side by side, each in its own thread. Knows threads, not what a pass computes.

On a CPU two passes with one thread each take less time than one after the other with two: in between the large
products there is much that is too small to share.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine.model.moe_lora import ServingDeltas

MAX_PASSES = 8  # at once; with more threads than that, a pass has several

Work = TypeVar("Work")
Result = TypeVar("Result")


class ThreadedDeltas:
    """A source of deltas with a step for each thread, so that one base computes many passes at once."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def mine(self) -> ServingDeltas:
        """This thread's own."""
        if not hasattr(self._local, "deltas"):
            self._local.deltas = ServingDeltas()
        deltas: ServingDeltas = self._local.deltas
        return deltas

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(..., O), (..., I) -> (..., O): y plus the deltas of this thread's step."""
        return self.mine.add_delta(y, x, layer, group, index)


def run_side_by_side(
    work: Sequence[Work], run: Callable[[Work], Result], on_result: Callable[[int, Result], None]
) -> None:
    """Calls `on_result` in this thread with the index and result of each piece, as they end. The first error ends all.

    How many threads a piece has depends on torch's number of threads alone, so its result does too.
    """
    num_threads = torch.get_num_threads()
    passes = min(num_threads, MAX_PASSES)
    threads_each = partial(torch.set_num_threads, num_threads // passes)
    pool = ThreadPoolExecutor(passes, thread_name_prefix="pass", initializer=threads_each)
    try:
        indices = {pool.submit(run, piece): index for index, piece in enumerate(work)}
        for future in as_completed(indices):
            on_result(indices[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what threads that are yet to start take for theirs
