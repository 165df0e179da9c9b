"""Turns instruction records into token sequences whose loss counts on the answer only. Knows no model.

A record is `{"instruction", "input"?, "output", "source"?}`, one JSON object a line. It is rendered with the base's
own chat template, exactly as serving renders a request, so a stack is trained on what it will see.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import BadRecord


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction and its answer."""

    instruction: str
    output: str
    input: str = ""
    source: str = ""

    @property
    def prompt(self) -> str:
        """What the user says: the instruction and, on its own paragraph, the input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered record: `token_ids` whose first `prompt_length` carry no loss."""

    token_ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        """How many tokens carry loss."""
        return len(self.token_ids) - self.prompt_length


def read_records(path: Path) -> list[Record]:
    """Every record of a JSONL file. Raises BadRecord that names file, line and field."""
    with path.open(encoding="utf-8") as lines:
        return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, place: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{place}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRecord(f"{place}: expected an object, got {type(fields).__name__}")
    for name in ("instruction", "output"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise BadRecord(f"{place}: field {name!r} must be a non-empty string, got {fields.get(name)!r}")
    for name in ("input", "source"):
        if not isinstance(fields.get(name, ""), str):
            raise BadRecord(f"{place}: field {name!r} must be a string, got {fields[name]!r}")
    return Record(fields["instruction"], fields["output"], fields.get("input", ""), fields.get("source", ""))


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


def split_records(records: Sequence[Record], *, held_out: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; every record of one prompt lands on the same side."""
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(" ".join(record.prompt.split()).casefold(), []).append(record)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)  # noqa: S311 - reproducible, not secret
    train: list[Record] = []
    held: list[Record] = []
    for prompt in prompts:
        (held if len(held) < held_out else train).extend(by_prompt[prompt])
    return train, held


def batches(examples: Sequence[Example], *, max_tokens: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of examples of like length, each at most `max_tokens` with padding; epochs differ in order."""
    epoch = 0
    while True:
        yield from _epoch(examples, max_tokens=max_tokens, shuffle=random.Random(seed * 1_000_003 + epoch))  # noqa: S311
        epoch += 1


def _epoch(examples: Sequence[Example], *, max_tokens: int, shuffle: random.Random) -> list[list[Example]]:
    order = list(examples)
    shuffle.shuffle(order)
    order.sort(key=lambda example: len(example.token_ids))  # stable: equal lengths stay shuffled
    grouped = length_batches(order, max_tokens=max_tokens)
    shuffle.shuffle(grouped)
    return grouped


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
