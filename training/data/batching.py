"""Groups examples into batches, steps and passes. Knows lengths and the seed, no tokens' meaning.

A step is what one update of the weights learns from; a pass is what one forward and backward holds.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import count

from training.data.examples import Example


def step_batches(
    examples: Sequence[Example], *, tokens_per_step: int, tokens_per_pass: int | None, seed: int
) -> Iterator[list[list[Example]]]:
    """Endless steps, each a list of passes. What a step learns from does not depend on `tokens_per_pass`.

    A step is at most `tokens_per_step` with padding, or one example; so is a pass with `tokens_per_pass`, None for a
    step in one pass. Steps and passes are of like length; epochs differ in order.
    """
    for step in batches(examples, max_tokens=tokens_per_step, seed=seed):
        yield [step] if tokens_per_pass is None else length_batches(step, max_tokens=tokens_per_pass)


def packed_steps(
    examples: Sequence[Example], *, tokens_per_step: int, tokens_per_pass: int | None, seed: int
) -> Iterator[list[list[Example]]]:
    """Endless steps as of `step_batches`, but without padding, and of any lengths in the epoch's seeded order."""
    for order, _ in _epochs(examples, seed=seed):
        for step in packed_passes(order, max_tokens=tokens_per_step):
            yield [step] if tokens_per_pass is None else packed_passes(step, max_tokens=tokens_per_pass)


def packed_passes(examples: Sequence[Example], *, max_tokens: int) -> list[list[Example]]:
    """Examples in their given order, side by side without padding, at most `max_tokens` in a pass, or one example."""
    passes: list[list[Example]] = []
    used_tokens = 0
    for example in examples:
        used_tokens += len(example.token_ids)
        if passes and used_tokens <= max_tokens:
            passes[-1].append(example)
        else:
            passes.append([example])
            used_tokens = len(example.token_ids)
    return passes


def batches(examples: Sequence[Example], *, max_tokens: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of examples of like length, each at most `max_tokens` with padding; epochs differ in order."""
    for order, shuffle in _epochs(examples, seed=seed):
        order.sort(key=lambda example: len(example.token_ids))  # stable: equal lengths stay shuffled
        grouped = length_batches(order, max_tokens=max_tokens)
        shuffle.shuffle(grouped)
        yield from grouped


def length_batches(ordered: Sequence[Example], *, max_tokens: int) -> list[list[Example]]:
    """Consecutive examples in batches whose padded size is at most `max_tokens`, or of one example."""
    grouped: list[list[Example]] = []
    longest = 0
    for example in ordered:
        longest = max(longest, len(example.token_ids))
        if grouped and longest * (len(grouped[-1]) + 1) <= max_tokens:
            grouped[-1].append(example)
        else:
            grouped.append([example])
            longest = len(example.token_ids)
    return grouped


def evaluation_batches(examples: Sequence[Example], *, max_tokens: int) -> list[list[Example]]:
    """All examples once, in batches of like length: the same for the same examples in the same order."""
    return length_batches(sorted(examples, key=lambda example: len(example.token_ids)), max_tokens=max_tokens)


def _epochs(examples: Sequence[Example], *, seed: int) -> Iterator[tuple[list[Example], random.Random]]:
    """Endless orders, each with the generator that made it. Raises ValueError if there is nothing to order."""
    if not examples:
        raise ValueError("there are no examples to make batches of")
    for epoch in count():
        shuffle = random.Random(seed * 1_000_003 + epoch)  # noqa: S311 - reproducible, not secret
        order = list(examples)
        shuffle.shuffle(order)
        yield order, shuffle
