"""Makes labelled examples of records, and shortens prompts that are too long. Knows the tokenizer, no model.

An example that is too long loses the end of what the user says, never a token of the answer or of the chat template:
the router reads a text by its start, so what is cut is what it would not see. A record whose answer leaves no room for
a single character of its prompt is left out, and named.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.data.examples import Example, render
from training.data.records import DomainName, Record


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A rendered prompt-answer pair and the domain it came from."""

    label: DomainName
    prompt: str  # whole, also if the example holds its start only
    example: Example
    is_cut: bool = False

    @property
    def prompt_sha256(self) -> str:
        """How reports and outcomes call the prompt."""
        return prompt_sha256(self.prompt)


@dataclass(frozen=True, slots=True)
class LabelledExamples:
    """Examples in the order of their labels and records, and the prompts left out, by their sha256."""

    examples: tuple[LabelledExample, ...]
    left_out: Mapping[DomainName, tuple[str, ...]]


def prompt_sha256(prompt: str) -> str:
    """sha256 in hex of what the user says."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def label_examples(
    tokenizer: Any, records: Mapping[DomainName, Sequence[Record]], *, max_tokens: int
) -> LabelledExamples:
    """Every record rendered under the name it stands under, in at most `max_tokens`."""
    examples: list[LabelledExample] = []
    left_out: dict[DomainName, tuple[str, ...]] = {}
    for label, of_label in records.items():
        rendered = [(record, render_within(tokenizer, record, max_tokens=max_tokens)) for record in of_label]
        examples += [
            LabelledExample(label, record.prompt, fitting[0], is_cut=fitting[1] < len(record.prompt))
            for record, fitting in rendered
            if fitting
        ]
        left_out[label] = tuple(prompt_sha256(record.prompt) for record, fitting in rendered if not fitting)
    return LabelledExamples(tuple(examples), left_out)


def render_within(tokenizer: Any, record: Record, *, max_tokens: int) -> tuple[Example, int] | None:
    """The record with as many of its prompt's first characters as fit, and how many; None if not one does."""
    whole = render(tokenizer, record)
    if len(whole.token_ids) <= max_tokens:
        return whole, len(record.prompt)
    best: tuple[Example, int] | None = None
    fits, too_many = 0, len(record.prompt)
    while too_many - fits > 1:
        kept = (fits + too_many) // 2
        example = render(tokenizer, replace(record, instruction=record.prompt[:kept], input=""))
        if len(example.token_ids) <= max_tokens:
            best, fits = (example, kept), kept
        else:
            too_many = kept
    return best
