"""A domain is added by one query: it is learnt, and every old score keeps its bits."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.checkpoint import RouterCheckpoint
from router.features import pad_features
from router.network import MetaRouter
from router.policy import RoutingPolicy
from tests.unit.training.router.toy import (
    DOMAINS,
    FILLERS,
    RECIPE,
    SETTINGS,
    THRESHOLD,
    WORDS,
    features_of,
    labelled_examples,
    router_of,
    split,
)
from training.router.examples import SplitExamples
from training.router.extending import extend_router
from training.router.learning import BestEpoch, train_router
from training.router.reports import DomainQuality

ALL = (*DOMAINS, "law")
WIDE = dataclasses.replace(RECIPE, hidden_dim=64, epochs=8)  # room for words that no old query looks for


@pytest.fixture(scope="module")
def sides() -> SplitExamples:
    """Prompts of the old domains and of the new one."""
    return split(labelled_examples(ALL))


@pytest.fixture(scope="module")
def old() -> MetaRouter:
    """A router of the old domains."""
    return train_router(split(labelled_examples()), threshold=THRESHOLD, recipe=WIDE).network


def extend(old: MetaRouter, sides: SplitExamples, *, epochs: int = 8) -> BestEpoch[DomainQuality]:
    recipe = dataclasses.replace(WIDE, epochs=epochs)
    return extend_router(old, sides, domain="law", threshold=THRESHOLD, recipe=recipe)


def through_a_file(network: MetaRouter) -> MetaRouter:
    checkpoint = RouterCheckpoint(network, SETTINGS, RoutingPolicy(), dict.fromkeys(network.domains, ()), "base-1")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "router.safetensors")
        return RouterCheckpoint.load(Path(folder) / "router.safetensors").network


def test_the_new_domain_is_learnt(old: MetaRouter, sides: SplitExamples) -> None:
    extended = extend(old, sides)
    assert extended.metrics.auc == 1.0
    assert (extended.metrics.metrics.precision, extended.metrics.metrics.recall) == (1.0, 1.0)
    assert extended.metrics.bce < 0.05
    assert router_of(extended.network).route("the judge of court").scores["law"] > 0.5
    assert router_of(extended.network).route("the loop of string").scores["law"] < 0.5


def test_all_but_the_new_query_is_as_it_was(old: MetaRouter, sides: SplitExamples) -> None:
    extended = extend(old, sides, epochs=2).network
    assert extended.domains == ALL
    before, after = old.state_dict(), extended.state_dict()
    assert after.keys() - before.keys() == {"domain_queries.3"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, parameter in extended.named_parameters() if parameter.requires_grad] == ["domain_queries.3"]
    assert all(parameter.requires_grad for parameter in old.parameters())  # the old one is left alone


def test_old_scores_keep_their_bits_through_files(old: MetaRouter, sides: SplitExamples) -> None:
    before, after = through_a_file(old), through_a_file(extend(old, sides, epochs=2).network)
    words = [word for words in WORDS.values() for word in words] + FILLERS
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 1 + i % 13)) for i in range(1, 300) if i % 13]
    for start in range(0, len(texts), 7):  # in batches of several lengths, as in training
        batch = pad_features([features_of(text) for text in texts[start : start + 7]])
        assert torch.equal(before.scores(*batch), after.scores(*batch)[:, : len(DOMAINS)])
    one_by_one = [router_of(before).route(text).scores for text in texts]
    assert one_by_one == [{name: router_of(after).route(text).scores[name] for name in DOMAINS} for text in texts]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_no_random_query_moves_a_bit_of_another_score(seed: int, num_domains: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    network = MetaRouter(24, [f"d{i}" for i in range(num_domains)], hidden_dim=32).eval()
    batch = pad_features([torch.randn(length, 24) for length in lengths])
    before = network.scores(*batch)
    network.add_domain("new")
    torch.nn.init.normal_(network.domain_queries[-1], std=3.0)
    assert torch.equal(network.scores(*batch)[:, :num_domains], before)


def test_one_domain_alone_has_the_bits_of_its_column(old: MetaRouter) -> None:
    batch = pad_features([features_of("the loop of string"), features_of("a prime")])
    for column, name in enumerate(DOMAINS):
        assert torch.equal(old.domain_logit(name, *batch), old(*batch)[:, column])


def test_extending_is_reproducible_and_spends_no_global_random_numbers(old: MetaRouter, sides: SplitExamples) -> None:
    before = torch.get_rng_state()
    first, second = extend(old, sides, epochs=2), extend(old, sides, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.history == second.history
    assert torch.equal(first.network.domain_queries[-1], second.network.domain_queries[-1])


def test_the_epoch_with_the_lowest_cross_entropy_is_kept(old: MetaRouter, sides: SplitExamples) -> None:
    extended = extend(old, sides, epochs=5)
    losses = [quality.bce for quality in extended.history]
    assert extended.metrics.bce == min(losses)
    assert extended.best_epoch == losses.index(min(losses)) + 1


def test_examples_of_other_domains_are_refused(old: MetaRouter) -> None:
    with pytest.raises(ValueError, match=r"cannot add 'law' to a router of \('chat', 'code', 'math'\)"):
        extend_router(old, split(labelled_examples()), domain="law", threshold=THRESHOLD, recipe=RECIPE)
