"""Prepares what a router learns from: label targets and the split by prompt. Knows texts and names, no network.

Legend: N prompts, D domains.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from training.data.records import normalise_text


def label_targets(labels: Sequence[str], domains: Sequence[str]) -> Tensor:
    """One domain name per prompt -> (N, D) one-hot float32, in the order of `domains`.

    The floor domain is a domain like any other here: its floor is serving's policy and no target.
    """
    unknown = sorted(set(labels) - set(domains))
    if unknown:
        raise ValueError(f"labels {unknown} are not among the domains {list(domains)}")
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
