"""Metrics equal counts by hand, whatever the targets are blended to. Legend: N prompts, D domains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from router.network import MetaRouter
from tests.unit.training.router.toy import DOMAINS, THRESHOLD, FixedLogits, labelled_examples
from training.router.examples import RouterExamples
from training.router.metrics import domain_quality, evaluate_router, label_top1, measure
from training.router.prompts import RouterPrompts
from training.router.reports import RouterMetrics

SCORES = torch.tensor([[0.9, 0.1, 0.05], [0.6, 0.3, 0.01], [0.1, 0.1, 0.1], [0.3, 0.05, 0.8], [0.02, 0.01, 0.03]])
POSITIVE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]]).bool()
LABELS = ["chat", "code", "code", "math", "chat"]


def prompts_by_hand() -> RouterPrompts:
    """Blended, so that the second domain of every target is above any threshold."""
    label = torch.tensor([[float(name == of) for name in DOMAINS] for of in LABELS])
    return RouterPrompts(DOMAINS, list("abcde"), LABELS, 0.8 * POSITIVE + 0.2 * label, POSITIVE)


def metrics_by_hand() -> RouterMetrics:
    features = [torch.full((1, 1), float(row)) for row in range(5)]
    examples = RouterExamples(prompts_by_hand(), features)
    return evaluate_router(FixedLogits(SCORES.logit()), examples, threshold=THRESHOLD)


def test_metrics_equal_a_count_by_hand() -> None:
    metrics = metrics_by_hand()
    assert metrics.top1 == 2 / 4  # a and d; b chose chat, c has a tie of which the first is wrong, e has no domain.
    assert metrics.set_match == pytest.approx(3 / 5)  # a, d and e.
    assert metrics.single_top1 == 1 / 3  # a, of a, b and c.
    assert metrics.mixed_set_match == 1.0  # d.
    assert (metrics.num_prompts, metrics.num_single, metrics.num_mixed) == (5, 3, 1)
    assert metrics.bce == pytest.approx(
        functional.binary_cross_entropy(SCORES, prompts_by_hand().targets).item(), rel=1e-5
    )
    chat, code, math = (metrics.domains[name] for name in DOMAINS)
    assert (chat.precision, chat.recall, chat.num_positive) == (2 / 3, 1.0, 2)
    assert (code.precision, code.recall, code.num_positive) == (1.0, 1.0, 1)
    assert (math.precision, math.recall, math.num_positive) == (1.0, 1 / 2, 2)


def test_the_selection_score_weighs_singles_mixed_and_cross_entropy() -> None:
    metrics = metrics_by_hand()
    assert metrics.selection_score == pytest.approx(0.5 / 3 + 0.35 * 1.0 - 0.15 * metrics.bce)


def test_without_mixed_or_single_prompts_all_count() -> None:
    singles = measure(SCORES[:3].logit(), prompts_by_hand().select([0, 1, 2]), threshold=THRESHOLD)
    assert singles.mixed_set_match is None
    assert singles.selection_score == pytest.approx(0.5 / 3 + 0.35 * singles.set_match - 0.15 * singles.bce)
    mixed = measure(SCORES[3:4].logit(), prompts_by_hand().select([3]), threshold=THRESHOLD)
    assert mixed.single_top1 is None
    assert mixed.selection_score == pytest.approx(0.5 + 0.35 - 0.15 * mixed.bce)


def test_a_ratio_of_nothing_is_none() -> None:
    metrics = measure(torch.full((1, 3), -9.0), prompts_by_hand().select([4]), threshold=THRESHOLD)
    assert metrics.domains["chat"].precision is None
    assert metrics.domains["chat"].recall is None
    assert (metrics.top1, metrics.set_match) == (None, 1.0)
    assert metrics.selection_score == pytest.approx(0.35 - 0.15 * metrics.bce)


def test_the_label_is_counted_whatever_was_discovered() -> None:
    assert label_top1(SCORES.logit(), prompts_by_hand()) == pytest.approx(2 / 5)  # a and d; e chose math.


def test_one_domain_is_measured_by_its_own_column() -> None:
    quality = domain_quality(SCORES.logit(), prompts_by_hand(), "math", threshold=THRESHOLD)
    assert quality.metrics == metrics_by_hand().domains["math"]
    assert quality.auc == 1.0  # 0.1 and 0.8 against 0.05, 0.01 and 0.03.
    column = prompts_by_hand().targets[:, 2]
    assert quality.bce == pytest.approx(functional.binary_cross_entropy(SCORES[:, 2], column).item(), rel=1e-5)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3, *[st.booleans()] * 3), min_size=1, max_size=30))
def test_shares_are_shares_and_sets_are_counted_one_by_one(rows: list[tuple[float | bool, ...]]) -> None:
    scores, positive = torch.tensor([row[:3] for row in rows]), torch.tensor([row[3:] for row in rows]).bool()
    prompts = RouterPrompts(DOMAINS, list(map(str, range(len(rows)))), ["chat"] * len(rows), positive.float(), positive)
    metrics = measure(scores.logit(eps=1e-6), prompts, threshold=0.5)
    matches = sum(
        {i for i in range(3) if score[i] > 0.5} == {i for i in range(3) if right[i]}
        for score, right in zip(scores.logit(eps=1e-6).sigmoid().tolist(), positive.tolist(), strict=True)
    )
    assert metrics.set_match == pytest.approx(matches / len(rows))
    assert metrics.num_single + metrics.num_mixed + sum(not any(row[3:]) for row in rows) == len(rows)


def test_a_router_is_measured_on_its_own_domains_only() -> None:
    with pytest.raises(ValueError, match="cannot measure a router of"):
        evaluate_router(
            MetaRouter(12, DOMAINS, hidden_dim=4), labelled_examples(("code", "chat", "math")), threshold=0.1
        )
