"""Holds what a router is to learn of each prompt: label, targets, the domains that help. Knows texts, no features.

Legend: N prompts, D domains.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data.records import normalise_text


@dataclass(frozen=True, slots=True, eq=False)
class RouterPrompts:
    """N prompts: text, label, targets (N, D) in [0, 1] as the loss wants them, and positive (N, D) bool, which domains
    are right: a target is blended and soft, so that no threshold tells it.

    A prompt without a positive domain is one that the base answers best.
    """

    domains: tuple[str, ...]
    texts: Sequence[str]
    labels: Sequence[str]
    targets: Tensor
    positive: Tensor

    def __post_init__(self) -> None:
        counts = (len(self.texts), len(self.labels), len(self.targets), len(self.positive))
        if len(set(counts)) > 1:
            raise ValueError(f"texts, labels, targets and positive must be equally many, not {counts}")
        _require_known(self.labels, self.domains)
        shape = (len(self.texts), len(self.domains))
        for name, table in (("targets", self.targets), ("positive", self.positive)):
            if tuple(table.shape) != shape:
                raise ValueError(f"{name} of {shape} prompts and domains cannot have shape {tuple(table.shape)}")
        if self.positive.dtype != torch.bool:
            raise ValueError(f"positive must be bool, not {self.positive.dtype}")
        outside = ~((self.targets >= 0) & (self.targets <= 1)).all(dim=1)  # (N,); NaN is outside too.
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"targets must be in [0, 1], not {self.targets[row].tolist()} of prompt {row}")

    @property
    def label_columns(self) -> Tensor:
        """(N,): each label's place among the domains."""
        return torch.tensor([self.domains.index(label) for label in self.labels])

    def select(self, rows: Sequence[int]) -> "RouterPrompts":
        """The prompts of these rows."""
        return RouterPrompts(
            domains=self.domains,
            texts=[self.texts[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            targets=self.targets[list(rows)],
            positive=self.positive[list(rows)],
        )

    def by_label(self) -> "RouterPrompts":
        """The same prompts, whose label is all that is right."""
        targets = label_targets(self.labels, self.domains)
        return replace(self, targets=targets, positive=targets > 0)


def labelled_prompts(labelled: Sequence[tuple[str, str]], domains: Sequence[str]) -> RouterPrompts:
    """(text, label) pairs whose label is all that is right."""
    labels = [label for _, label in labelled]
    targets = label_targets(labels, domains)
    return RouterPrompts(tuple(domains), [text for text, _ in labelled], labels, targets, targets > 0)


def label_targets(labels: Sequence[str], domains: Sequence[str]) -> Tensor:
    """One domain name per prompt -> (N, D) one-hot float32, in the order of `domains`.

    The floor domain is a domain like any other here: its floor is serving's policy and no target.
    """
    _require_known(labels, domains)
    targets = torch.zeros(len(labels), len(domains))
    for row, label in enumerate(labels):
        targets[row, list(domains).index(label)] = 1.0
    return targets


def split_by_prompt(texts: Sequence[str], *, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `texts` for training and for validation, ascending; no prompt is in both.

    The share counts unique prompts and leaves at least one on each side. The choice depends on the set of prompts and
    the seed alone, so neither the order of the records nor a copy of one moves a prompt across.
    """
    prompts = [normalise_text(text) for text in texts]
    ranked = sorted(set(prompts), key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())
    if len(ranked) < 2:
        raise ValueError(f"a split needs at least 2 unique prompts, not {len(ranked)}")
    num_validation = min(max(round(validation_share * len(ranked)), 1), len(ranked) - 1)
    held_out = set(ranked[:num_validation])
    train = [row for row, prompt in enumerate(prompts) if prompt not in held_out]
    validation = [row for row, prompt in enumerate(prompts) if prompt in held_out]
    return train, validation


def _require_known(labels: Sequence[str], domains: Sequence[str]) -> None:
    unknown = sorted(set(labels) - set(domains))
    if unknown:
        raise ValueError(f"labels {unknown} are not among the domains {list(domains)}")
