"""Batches, steps and passes: what they hold, and that a step does not depend on how it is cut into passes."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.batching import batches, length_batches, packed_passes, packed_steps, step_batches
from training.data.examples import Example

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
Step = list[list[Example]]


def of_lengths(lengths: list[int]) -> list[Example]:
    """Examples that differ from each other."""
    return [Example((index, *range(length - 1)), 0) for index, length in enumerate(lengths)]


def padded(examples: list[Example]) -> int:
    return len(examples) * max(len(e.token_ids) for e in examples)


def total(examples: list[Example]) -> int:
    return sum(len(e.token_ids) for e in examples)


def epoch_of(steps: Iterator[Step], examples: list[Example]) -> list[Step]:
    """The first steps that hold as many examples as there are."""
    taken: list[Step] = []
    while sum(len(one) for step in taken for one in step) < len(examples):
        taken.append(next(steps))
    return taken


@given(LENGTHS)
def test_batches_hold_every_example_once_within_the_limit(lengths: list[int]) -> None:
    examples = of_lengths(sorted(lengths))
    grouped = length_batches(examples, max_tokens=60)
    assert [e for batch in grouped for e in batch] == examples
    assert all(len(batch) == 1 or padded(batch) <= 60 for batch in grouped)


def test_epochs_are_reproducible_and_differ() -> None:
    examples = of_lengths([5] * 20)
    first = list(islice(batches(examples, max_tokens=25, seed=3), 8))
    again = list(islice(batches(examples, max_tokens=25, seed=3), 8))
    assert first == again
    assert first[:4] != first[4:]
    assert Counter(e for batch in first[:4] for e in batch) == Counter(examples)


@pytest.mark.parametrize(("make_steps", "width"), [(step_batches, padded), (packed_steps, total)])
@given(LENGTHS, st.integers(20, 100), st.integers(1, 120), st.integers(0, 3))
def test_steps_and_passes_keep_their_limits_and_hold_an_epoch(
    make_steps: Callable[..., Iterator[Step]],
    width: Callable[[list[Example]], int],
    lengths: list[int],
    per_step: int,
    per_pass: int,
    seed: int,
) -> None:
    examples = of_lengths(lengths)
    steps = make_steps(examples, tokens_per_step=per_step, tokens_per_pass=per_pass, seed=seed)
    epoch = epoch_of(steps, examples)
    assert Counter(e for step in epoch for one in step for e in one) == Counter(examples)
    for step in epoch:
        whole = [e for one in step for e in one]
        assert len(whole) == 1 or width(whole) <= per_step
        assert all(len(one) == 1 or width(one) <= per_pass for one in step)
        assert len(step) == 1 or per_pass < per_step


@pytest.mark.parametrize("kind", [step_batches, packed_steps])
@given(LENGTHS, st.integers(1, 120))
def test_what_a_step_learns_from_does_not_depend_on_its_passes(kind: object, lengths: list[int], per_pass: int) -> None:
    make = step_batches if kind is step_batches else packed_steps
    examples = of_lengths(lengths)
    cut = make(examples, tokens_per_step=64, tokens_per_pass=per_pass, seed=1)
    whole = make(examples, tokens_per_step=64, tokens_per_pass=None, seed=1)
    for one, other in islice(zip(cut, whole, strict=False), 12):
        assert [[e for passed in one for e in passed]] == other


@given(LENGTHS)
def test_packing_keeps_the_order_and_starts_a_pass_only_when_the_last_is_full(lengths: list[int]) -> None:
    examples = of_lengths(lengths)
    passes = packed_passes(examples, max_tokens=60)
    assert [e for one in passes for e in one] == examples
    assert all(len(one) == 1 or total(one) <= 60 for one in passes)
    assert all(total(one) + len(after[0].token_ids) > 60 for one, after in pairwise(passes))


def test_no_examples_are_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="no examples"):
        next(step_batches([], tokens_per_step=8, tokens_per_pass=None, seed=1))
