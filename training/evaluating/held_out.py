"""Measures every held-out record's loss in each mode. Knows records and mixes, no statistics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.chat_tokens import special_tokens
from training.data.examples import render
from training.data.preparation import prepare_data
from training.data.records import DomainName
from training.discovery.candidate_losses import Row, RowLosses
from training.discovery.combinations import name_combination
from training.discovery.prompts import LabelledExample
from training.discovery.report import DiscoverySettings
from training.discovery.run import CACHE_FILE, FrozenDomains, search_examples
from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished, Progress
from training.evaluating.mixes import Mixes
from training.evaluating.modes import Mode
from training.evaluating.subject import Mix, Subject
from training.journal import JOURNAL_FOLDER
from training.recipe import Recipe

OnProgress = Callable[[str, int, int], None]  # what is being done, how far, of how much


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out records of a recipe's domains that can be measured whole, and how many cannot."""

    examples: tuple[LabelledExample, ...]
    too_long: Mapping[DomainName, int]


@dataclass(frozen=True, slots=True)
class RecordLosses:
    """One record: summed loss over its answer in each mode, in nats."""

    domain: DomainName
    prompt_sha256: str
    answer_tokens: int
    loss_sums: Mapping[Mode, float]
    routed_mix: Mix | None  # None if mode `routed` was not measured
    oracle: str | None  # the best combination, such as `chat+math` or `base`; None if it was not searched


def held_out_examples(recipe: Recipe, tokenizer: Any, *, limit: int | None) -> HeldOut:
    """The first `limit` held-out records of each domain, in the split's seeded order, in the base's chat template.

    As in training, a record of more than `max_example_tokens` is left out and counted. Raises EvaluationInvalid for a
    domain of which nothing is left.
    """
    prepared = prepare_data(recipe, own_tokens=special_tokens(tokenizer))
    max_tokens = recipe.settings.training.max_example_tokens
    examples: list[LabelledExample] = []
    too_long: dict[DomainName, int] = {}
    for name, records in prepared.domains.items():
        rendered = [LabelledExample(name, record.prompt, render(tokenizer, record)) for record in records.held_out]
        fitting = [labelled for labelled in rendered if len(labelled.example.token_ids) <= max_tokens]
        too_long[name] = len(rendered) - len(fitting)
        if not fitting:
            raise EvaluationInvalid(
                f"none of the {len(rendered)} held-out records of {name!r} fits {max_tokens} tokens"
            )
        examples += fitting[:limit]
    return HeldOut(tuple(examples), too_long)


def measure_held_out(
    subject: Subject,
    held_out: HeldOut,
    modes: Sequence[Mode],
    *,
    finished: Finished,
    store: Path,
    max_tokens: int,
    on_progress: OnProgress = lambda *_: None,
) -> list[RecordLosses]:
    """Every record in every mode, in order; a pass holds at most `max_tokens`. What is finished stays as it is."""
    examples = held_out.examples
    mixes = _mixes(subject, examples, [mode for mode in modes if mode != "oracle"], finished, on_progress)
    rows = [
        Row(labelled.example, mix)
        for of_mode in mixes.values()
        for labelled, mix in zip(examples, of_mode, strict=True)
    ]
    losses = iter(_row_losses(subject, rows, finished, max_tokens, lambda *at: on_progress("held-out loss", *at)))
    by_mode: dict[Mode, list[float]] = {mode: [next(losses) for _ in examples] for mode in mixes}
    oracle: list[str | None] = [None] * len(examples)
    if "oracle" in modes:
        best = _search(subject, examples, store, max_tokens, lambda *at: on_progress("oracle", *at))
        oracle, by_mode["oracle"] = [name for name, _ in best], [loss for _, loss in best]
    return [
        RecordLosses(
            domain=labelled.label,
            prompt_sha256=labelled.prompt_sha256,
            answer_tokens=labelled.example.answer_length,
            loss_sums={mode: by_mode[mode][index] for mode in modes},
            routed_mix=mixes["routed"][index] if "routed" in mixes else None,
            oracle=oracle[index],
        )
        for index, labelled in enumerate(examples)
    ]


def _mixes(
    subject: Subject,
    examples: Sequence[LabelledExample],
    modes: Sequence[Mode],
    finished: Finished,
    on_progress: OnProgress,
) -> dict[Mode, list[Mix]]:
    labels, texts = [labelled.label for labelled in examples], [labelled.prompt for labelled in examples]
    mixes = Mixes(subject, finished)
    return {
        mode: mixes.of_mode(mode, labels=labels, texts=texts, on_progress=lambda *at: on_progress("routes", *at))
        for mode in modes
    }


def _row_losses(
    subject: Subject, rows: Sequence[Row], finished: Finished, max_tokens: int, on_progress: Progress
) -> list[float]:
    """Each row's summed loss."""
    meter = RowLosses(subject.base, subject.stacks, max_tokens=max_tokens)
    keys = [subject.key("loss", row.weights, row.example.token_ids, row.example.prompt_length) for row in rows]

    def measure(missing: list[int]) -> Iterator[Mapping[int, float]]:
        for batch in meter.plan([rows[index] for index in missing]):
            indices = [missing[place] for place in batch]
            losses = meter.measure_batch([rows[index] for index in indices])
            yield {index: loss.loss_sum for index, loss in zip(indices, losses, strict=True)}

    return finished.complete(keys, measure, on_progress)


def _search(
    subject: Subject, examples: Sequence[LabelledExample], store: Path, max_tokens: int, on_progress: Progress
) -> list[tuple[str, float]]:
    """Each record's best combination of domains at weight 1 that the greedy search finds, and its summed loss.

    Any gain counts, however small; the losses are kept where discovery keeps its own.
    """
    found = search_examples(
        [labelled.example for labelled in examples],
        base=subject.base,
        domains=FrozenDomains(subject.stacks, subject.digests),
        settings=DiscoverySettings(
            search="greedy",
            threshold=0.0,
            soft_domains=(),
            prompts_per_domain=len(examples),
            max_example_tokens=max(len(labelled.example.token_ids) for labelled in examples),
        ),
        cache=store / JOURNAL_FOLDER / CACHE_FILE,
        max_tokens=max_tokens,
        on_progress=lambda progress: on_progress(progress.done, progress.total),
    )
    names = tuple(subject.stacks)
    best = [min(outcome.losses, key=outcome.losses.__getitem__) for outcome in found.outcomes]
    return [
        (name_combination(combination, names), outcome.losses[combination] * labelled.example.answer_length)
        for combination, outcome, labelled in zip(best, found.outcomes, examples, strict=True)
    ]
