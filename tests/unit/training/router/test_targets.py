"""Records become prompts with labels or with what was discovered of them."""

from pathlib import Path

import pytest
import torch

from training.data.data_report import DataReport
from training.data.preparation import PreparedData
from training.data.records import DomainRecords, Record
from training.discovery.combinations import BASE, Outcome
from training.discovery.outcomes import StoredOutcome, StoredOutcomes
from training.discovery.prompts import prompt_sha256
from training.errors import DiscoveryInvalid
from training.router.target_kind import TargetKind
from training.router.targets import choose_prompts, outcomes_to_learn

DOMAINS = ("chat", "math")


def data_of(**train: list[str]) -> PreparedData:
    domains = {
        name: DomainRecords(name, [Record(text, "answer") for text in texts], [Record(f"{name} held out", "answer")])
        for name, texts in train.items()
    }
    return PreparedData(domains, DataReport({}))


def outcome(*best: str, soft: tuple[str, ...] = ()) -> Outcome:
    return Outcome(best=frozenset(best), soft=frozenset(soft), losses={BASE: 1.0})


def stored(label: str, prompt: str, found: Outcome) -> StoredOutcome:
    return StoredOutcome(label, prompt_sha256(prompt), found)


def test_without_outcomes_the_first_prompts_have_their_labels() -> None:
    data = data_of(chat=["a", "b", "c"], math=["d"])
    chosen = choose_prompts(data, DOMAINS, prompts_per_domain=2, outcomes=None)
    assert (chosen.kind, chosen.prompts.texts, chosen.prompts.labels) == (
        TargetKind.LABELS,
        ["a", "b", "d"],
        ["chat", "chat", "math"],
    )
    assert not chosen.unsearched.texts


def test_with_outcomes_each_is_a_prompt_and_those_without_have_their_labels() -> None:
    data = data_of(chat=["a", "b", "b", "c"], math=["a", "d"])
    found = StoredOutcomes(
        DOMAINS,
        (
            stored("chat", "a", outcome("chat", "math", soft=("math",))),
            stored("chat", "b", outcome()),
            stored("chat", "b", outcome("math")),  # the same prompt with another answer
            stored("math", "a", outcome("math")),
        ),
    )
    chosen = choose_prompts(data, DOMAINS, prompts_per_domain=10, outcomes=found)
    assert chosen.kind is TargetKind.DISCOVERED
    assert chosen.prompts.texts == ["a", "b", "b", "a"]
    assert chosen.prompts.labels == ["chat", "chat", "chat", "math"]
    expected = torch.tensor([[1.0, 0.4], [0.2, 0.0], [0.2, 0.8], [0.0, 1.0]])
    torch.testing.assert_close(chosen.prompts.targets, expected)
    assert chosen.prompts.positive.tolist() == [[True, True], [False, False], [False, True], [False, True]]
    assert (chosen.unsearched.texts, chosen.unsearched.labels) == (["c", "d"], ["chat", "math"])
    assert chosen.unsearched.targets.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_columns_follow_the_order_that_is_asked_for() -> None:
    found = StoredOutcomes(DOMAINS, (stored("chat", "a", outcome("chat")),))
    chosen = choose_prompts(data_of(chat=["a"], math=["b"]), ("math", "chat"), prompts_per_domain=10, outcomes=found)
    assert chosen.prompts.positive.tolist() == [[False, True]]


def test_a_domain_that_was_not_searched_is_refused_by_name() -> None:
    found = StoredOutcomes(("chat",), (stored("chat", "a", outcome("chat")),))
    with pytest.raises(DiscoveryInvalid, match=r"\['math'\] were not searched"):
        choose_prompts(data_of(chat=["a"], math=["b"]), DOMAINS, prompts_per_domain=10, outcomes=found)


def test_outcomes_of_other_prompts_are_refused() -> None:
    found = StoredOutcomes(DOMAINS, (stored("chat", "gone", outcome("chat")),))
    with pytest.raises(DiscoveryInvalid, match="no training prompt has an outcome"):
        choose_prompts(data_of(chat=["a"], math=["b"]), DOMAINS, prompts_per_domain=10, outcomes=found)


def test_a_store_without_outcomes_gives_labels_unless_outcomes_are_wanted(tmp_path: Path) -> None:
    assert outcomes_to_learn(tmp_path, None) is None
    assert outcomes_to_learn(tmp_path, TargetKind.LABELS) is None
    with pytest.raises(DiscoveryInvalid, match="has no outcomes: run brainstacks-train discover"):
        outcomes_to_learn(tmp_path, TargetKind.DISCOVERED)
