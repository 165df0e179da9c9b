"""Puts prompts and their features side by side, and batches them. Knows no base and no network.

Legend: N prompts, B prompts in a batch, T tokens, H hidden size of the base, D domains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.features import pad_features
from training.data.records import normalise_text
from training.router.prompts import RouterPrompts, split_by_prompt


@dataclass(frozen=True, slots=True, eq=False)
class RouterExamples:
    """N prompts with their features (T_n, H), of any float type, on the CPU.

    Features are turned into float32 batch by batch, so a caller who is short of memory may keep them in float16.
    """

    prompts: RouterPrompts
    features: Sequence[Tensor]

    def __post_init__(self) -> None:
        if len(self.prompts.texts) != len(self.features):
            raise ValueError(f"{len(self.prompts.texts)} prompts have {len(self.features)} features; must be as many")
        for row, features in enumerate(self.features):
            if features.ndim != 2 or not len(features) or features.shape[1] != self.features[0].shape[-1]:
                raise ValueError(f"features of prompt {row} must be (T, H), not {tuple(features.shape)}")

    @property
    def domains(self) -> tuple[str, ...]:
        return self.prompts.domains

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: Sequence[int]) -> "RouterExamples":
        """The examples of these rows, sharing their features."""
        return RouterExamples(self.prompts.select(rows), [self.features[row] for row in rows])

    def by_label(self) -> "RouterExamples":
        """The same features, with the label as all that is right."""
        return RouterExamples(self.prompts.by_label(), self.features)

    def batches(
        self, batch_prompts: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """features (B, T, H), mask (B, T), targets (B, D), in order; only the last may be smaller."""
        targets = torch.split(self.prompts.targets.float(), batch_prompts)
        for (features, mask), part in zip(pad_batches(self.features, batch_prompts), targets, strict=True):
            yield features.to(device), mask.to(device), part.to(device)


def joined(first: RouterExamples, second: RouterExamples) -> RouterExamples:
    """The examples of both, which have the same domains."""
    a, b = first.prompts, second.prompts
    prompts = RouterPrompts(
        domains=a.domains,
        texts=[*a.texts, *b.texts],
        labels=[*a.labels, *b.labels],
        targets=torch.cat([a.targets, b.targets]),
        positive=torch.cat([a.positive, b.positive]),
    )
    return RouterExamples(prompts, [*first.features, *second.features])


@dataclass(frozen=True, slots=True, eq=False)
class SplitExamples:
    """What a router learns from and what chooses its best epoch. No prompt is on both sides."""

    train: RouterExamples
    validation: RouterExamples

    def by_label(self) -> "SplitExamples":
        """The same prompts on the same sides, with the label as all that is right."""
        return SplitExamples(self.train.by_label(), self.validation.by_label())

    def with_more(self, examples: RouterExamples) -> "SplitExamples":
        """More to learn from: those whose prompt is not one that validates."""
        validating = {normalise_text(text) for text in self.validation.prompts.texts}
        rows = [row for row, text in enumerate(examples.prompts.texts) if normalise_text(text) not in validating]
        return SplitExamples(joined(self.train, examples.select(rows)), self.validation) if rows else self


def pad_batches(features: Sequence[Tensor], batch_prompts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """N features (T_n, H) -> features (B, T, H) float32, mask (B, T), in order; only the last may be smaller."""
    for start in range(0, len(features), batch_prompts):
        yield pad_features(features[start : start + batch_prompts])


def split_examples(examples: RouterExamples, *, validation_share: float, seed: int) -> SplitExamples:
    """The split by prompt."""
    train, validation = split_by_prompt(examples.prompts.texts, validation_share=validation_share, seed=seed)
    return SplitExamples(examples.select(train), examples.select(validation))
