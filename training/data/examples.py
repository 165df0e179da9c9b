"""Turns records into token sequences whose loss counts on the answer only. Knows the tokenizer, no model.

A record is rendered with the base's own chat template, exactly as serving renders a request, so a stack is trained on
what it will see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.data.records import DomainRecords, Record
from training.errors import BadRecord, DataUnusable


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered record: `token_ids` whose first `prompt_length` carry no loss."""

    token_ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        """How many tokens carry loss."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class DomainExamples:
    """A domain's rendered examples, and how many of its records were too long to use whole."""

    train: list[Example]
    held_out: list[Example]
    too_long: int


def render(tokenizer: Any, record: Record) -> Example:
    """The record in the base's chat template; the loss counts on the answer and the token that ends it."""
    user = [{"role": "user", "content": record.prompt}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    answer = [*user, {"role": "assistant", "content": record.output}]
    whole = tokenizer.apply_chat_template(answer, tokenize=False)
    if not whole.startswith(prompt):
        raise BadRecord("the chat template renders an answer differently from the prompt that asks for it")
    # Tokenised apart, so that the prompt has the very tokens that serving gives it.
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(whole[len(prompt) :].rstrip(), add_special_tokens=False)
    return Example((*prompt_ids, *answer_ids), len(prompt_ids))


def render_domain(tokenizer: Any, records: DomainRecords, *, max_tokens: int) -> DomainExamples:
    """Both sides of a domain rendered. A record of more than `max_tokens` is left out and counted, never cut.

    Raises DataUnusable that names the domain if nothing is left on one side.
    """
    train, held_out = (_fitting(tokenizer, side, max_tokens) for side in (records.train, records.held_out))
    for name, side, examples in (("train on", records.train, train), ("hold out", records.held_out, held_out)):
        if not examples:
            raise DataUnusable(
                f"domain {records.domain!r} has nothing to {name}: "
                f"none of {len(side)} records has at most {max_tokens} tokens"
            )
    too_long = len(records.train) + len(records.held_out) - len(train) - len(held_out)
    return DomainExamples(train, held_out, too_long)


def _fitting(tokenizer: Any, records: Sequence[Record], max_tokens: int) -> list[Example]:
    rendered = (render(tokenizer, record) for record in records)
    return [example for example in rendered if len(example.token_ids) <= max_tokens]
