"""Prompts fit together, and are split so that none is on both sides. Legend: N prompts, D domains."""

import pytest
import torch

from tests.unit.training.router.toy import DOMAINS, discovered_prompts
from training.data.records import normalise_text
from training.router.examples import RouterExamples, split_examples
from training.router.prompts import RouterPrompts, label_targets, labelled_prompts, split_by_prompt


@pytest.mark.parametrize("seed", range(5))
def test_a_split_never_shares_a_prompt(seed: int) -> None:
    texts = [
        form.format(i) for i in range(40) for form in ("What is {}?", "what  is\n{}? ", "WHAT IS {}?", "What was {}?")
    ]
    train_rows, validation_rows = split_by_prompt(texts, validation_share=0.25, seed=seed)
    assert sorted(train_rows + validation_rows) == list(range(160))
    held_out = {normalise_text(texts[row]) for row in validation_rows}
    assert len(held_out) == 20
    assert held_out.isdisjoint(normalise_text(texts[row]) for row in train_rows)


def test_a_split_depends_on_the_prompts_and_the_seed_only() -> None:
    texts = [f"prompt {i}" for i in range(50)]

    def held_out(records: list[str], seed: int) -> set[str]:
        return {records[row] for row in split_by_prompt(records, validation_share=0.2, seed=seed)[1]}

    assert held_out(texts, 1) == held_out([*texts[::-1], texts[3]], 1)
    assert held_out(texts, 1) != held_out(texts, 2)


@pytest.mark.parametrize(("share", "num_validation"), [(0.01, 1), (0.99, 2)])
def test_a_split_leaves_a_prompt_on_each_side(share: float, num_validation: int) -> None:
    train_rows, validation_rows = split_by_prompt(["a", "b", "c"], validation_share=share, seed=0)
    assert (len(train_rows), len(validation_rows)) == (3 - num_validation, num_validation)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least 2 unique prompts, not 1"):
        split_by_prompt(["a", "A "], validation_share=0.5, seed=0)


def test_labels_become_one_hot_rows() -> None:
    assert label_targets(["math", "chat"], DOMAINS).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    prompts = labelled_prompts([("a", "math"), ("b", "chat")], DOMAINS)
    assert prompts.positive.tolist() == [[False, False, True], [True, False, False]]
    assert prompts.label_columns.tolist() == [2, 0]


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['law'\] are not among the domains"):
        label_targets(["math", "law"], DOMAINS)
    with pytest.raises(ValueError, match=r"\['law'\] are not among the domains"):
        RouterPrompts(DOMAINS, ["a"], ["law"], torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))


def test_by_label_keeps_the_prompts_and_forgets_what_was_discovered() -> None:
    prompts = discovered_prompts()
    plain = prompts.by_label()
    assert (plain.texts, plain.labels) == (prompts.texts, prompts.labels)
    assert torch.equal(plain.targets, label_targets(prompts.labels, DOMAINS))
    assert torch.equal(plain.positive, plain.targets == 1)
    assert not torch.equal(plain.positive, prompts.positive)


def test_both_routers_of_a_comparison_have_the_same_sides() -> None:
    prompts = discovered_prompts()
    examples = RouterExamples(prompts, [torch.zeros(1, 2)] * len(prompts.texts))
    split = split_examples(examples, validation_share=0.2, seed=1)
    assert split.by_label().train.prompts.texts == split.train.prompts.texts
    assert split.by_label().validation.prompts.texts == split.validation.prompts.texts


def test_prompts_that_do_not_fit_together_are_refused() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"equally many, not \(1, 2, 2, 2\)"):
        RouterPrompts(DOMAINS, ["a"], ["chat"] * 2, torch.zeros(2, 3), none)
    with pytest.raises(ValueError, match=r"targets of \(2, 3\) prompts and domains cannot have shape \(2, 4\)"):
        RouterPrompts(DOMAINS, ["a", "b"], ["chat"] * 2, torch.zeros(2, 4), none)
    with pytest.raises(ValueError, match=r"positive must be bool, not torch\.float32"):
        RouterPrompts(DOMAINS, ["a", "b"], ["chat"] * 2, torch.zeros(2, 3), none.float())
    with pytest.raises(ValueError, match="of prompt 1"):
        RouterPrompts(DOMAINS, ["a", "b"], ["chat"] * 2, torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.1, 0.0]]), none)


def test_features_that_do_not_fit_are_refused() -> None:
    prompts = labelled_prompts([("a", "math"), ("b", "chat")], DOMAINS)
    with pytest.raises(ValueError, match="2 prompts have 1 features"):
        RouterExamples(prompts, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"features of prompt 1 must be \(T, H\), not \(0, 3\)"):
        RouterExamples(prompts, [torch.ones(2, 3), torch.ones(0, 3)])
