"""Small stand-ins that tests share. Real behaviour in miniature, never a recorded answer."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stack_store.format import (
    PROJECTIONS,
    Geometry,
    ProjectionTensors,
    StackHeader,
    pack_groups,
    write_stack,
)

P = ParamSpec("P")
T = TypeVar("T")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, `<bos>` (id 1) in front unless special tokens are declined; other words are `<unk>` (id 0)."""
    vocabulary = {word: token_id for token_id, word in enumerate(["<unk>", "<bos>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>"
    )


class TableHiddenStates:
    """A base whose hidden states are two fixed random rows per token id; remembers the ids that it was asked for."""

    def __init__(self, *, num_token_ids: int, hidden_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mid = torch.randn(num_token_ids, hidden_size, generator=generator)
        self.last = torch.randn(num_token_ids, hidden_size, generator=generator)
        self.asked: list[list[int]] = []

    def __call__(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked.append(list(token_ids))
        return self.mid[list(token_ids)], self.last[list(token_ids)]


def tiny_geometry(*, num_layers: int = 2, hidden: int = 8, kv: int = 4, intermediate: int = 12) -> Geometry:
    """A base of a few features, with fewer key and value heads than query heads."""
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    shapes |= {
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    return Geometry(num_layers=num_layers, shapes=shapes)


def tiny_header(
    *,
    domain: str = "math",
    round: int = 1,
    base_fingerprint: str = "tiny-base",
    geometry: Geometry | None = None,
    weights: Literal["bf16", "int8"] = "bf16",
) -> StackHeader:
    """Four experts of rank 3, two of them active."""
    return StackHeader(
        base_fingerprint=base_fingerprint,
        geometry=geometry or tiny_geometry(),
        num_experts=4,
        rank=3,
        top_k=2,
        scale=4.0,
        domain=domain,
        round=round,
        recipe_digest="recipe",
        null_space_folded=False,
        weights=weights,
    )


def random_projections(header: StackHeader, *, seed: int = 0) -> dict[tuple[int, str], ProjectionTensors]:
    """Normal values that bf16 holds exactly, for every layer and projection."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    experts, rank = header.num_experts, header.rank
    return {
        (layer, name): ProjectionTensors(
            a=normal(experts, rank, header.geometry.shapes[name][0]),
            b=normal(experts, header.geometry.shapes[name][1], rank),
            gate=normal(experts, header.geometry.shapes[name][0]),
        )
        for layer in range(header.geometry.num_layers)
        for name in PROJECTIONS
    }


def write_random_stack(path: Path, header: StackHeader, *, seed: int = 0) -> str:
    """A stack file of random_projections. Returns its digest."""
    return write_stack(path, header, pack_groups(header, random_projections(header, seed=seed)))


class ManualClock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class ManualExecutor(Executor):
    """Runs submitted jobs one by one, in the caller's thread, when told to and in the order told."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        self.jobs.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future

    def run_next(self) -> None:
        self.run(0)

    def run(self, index: int) -> None:
        """Runs the job that was submitted `index` jobs after the oldest."""
        job = self.jobs.pop(index)
        job()

    def run_all(self) -> None:
        while self.jobs:
            self.run_next()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            self.jobs.clear()
