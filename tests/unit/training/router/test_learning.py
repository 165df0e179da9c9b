"""A router learns what can be learnt, reproducibly, and its best epoch is kept."""

import dataclasses
from pathlib import Path

import pytest
import torch

from router.checkpoint import RouterCheckpoint
from router.policy import RoutingPolicy
from router.router import Router
from tests.unit.training.router.toy import (
    DOMAINS,
    HIDDEN_STATES,
    RECIPE,
    SETTINGS,
    THRESHOLD,
    TOKENIZER,
    discovered_prompts,
    examples_of,
    labelled_examples,
    router_of,
    split,
)
from training.errors import TrainingDiverged
from training.router.examples import RouterExamples, SplitExamples
from training.router.learning import BestEpoch, RouterProgress, RouterRecipe, router_loss, train_router
from training.router.metrics import evaluate_router
from training.router.reports import RouterMetrics


def train(examples: SplitExamples, recipe: RouterRecipe = RECIPE) -> BestEpoch[RouterMetrics]:
    return train_router(examples, threshold=THRESHOLD, recipe=recipe)


def with_features(examples: RouterExamples, change: float) -> SplitExamples:
    return split(RouterExamples(examples.prompts, [features * change for features in examples.features]))


def test_separable_prompts_are_learnt() -> None:
    trained = train(split(labelled_examples()))
    assert trained.metrics.top1 == 1.0
    assert trained.metrics.set_match > 0.9
    assert trained.history[0].bce > trained.metrics.bce
    assert all(metrics.recall == 1.0 for metrics in trained.metrics.domains.values())


def test_what_was_discovered_is_learnt_better_from_it_than_from_labels() -> None:
    sides = split(examples_of(discovered_prompts()))
    recipe = dataclasses.replace(RECIPE, margin_weight=0.0)
    discovered = train(sides, recipe)
    by_label = evaluate_router(train(sides.by_label(), recipe).network, sides.validation, threshold=THRESHOLD)
    assert discovered.metrics.num_mixed > 5
    assert discovered.metrics.single_top1 == 1.0
    assert discovered.metrics.mixed_set_match is not None
    assert by_label.mixed_set_match is not None
    assert discovered.metrics.mixed_set_match > by_label.mixed_set_match + 0.3
    assert discovered.metrics.bce < by_label.bce


def test_a_trained_router_routes_identically_after_loading(tmp_path: Path) -> None:
    examples = labelled_examples()
    network = train(split(examples)).network
    checkpoint = RouterCheckpoint(
        network=network,
        settings=SETTINGS,
        policy=RoutingPolicy(),
        stack_digests=dict.fromkeys(DOMAINS, ()),
        base_fingerprint="base-1",
    )
    checkpoint.save(tmp_path / "router.safetensors")
    loaded = RouterCheckpoint.load(tmp_path / "router.safetensors")
    before = router_of(network)
    after = Router.from_checkpoint(loaded, tokenizer=TOKENIZER, hidden_states=HIDDEN_STATES)
    texts = examples.prompts.texts
    assert [after.route(text) for text in texts] == [before.route(text) for text in texts]
    assert before.route("the loop of string").mix.keys() == {"chat", "code"}
    assert before.route("a prime is root").mix["math"] > 0.5


def test_the_seed_decides_the_result() -> None:
    examples = split(labelled_examples())
    recipe = dataclasses.replace(RECIPE, epochs=2)
    first, second = train(examples, recipe), train(examples, recipe)
    other = train(examples, dataclasses.replace(recipe, seed=7))
    assert first.history == second.history
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name])
    assert not torch.equal(first.network.global_query, other.network.global_query)


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    train(split(labelled_examples()), dataclasses.replace(RECIPE, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_epoch_is_kept() -> None:
    examples = split(labelled_examples())
    trained = train(examples, dataclasses.replace(RECIPE, learning_rate=0.3, epochs=5))  # So large that it jumps about.
    scores = [metrics.selection_score for metrics in trained.history]
    assert trained.best_epoch == scores.index(max(scores)) + 1
    assert trained.metrics == trained.history[trained.best_epoch - 1]
    assert evaluate_router(trained.network, examples.validation, threshold=THRESHOLD) == trained.metrics


def test_progress_tells_every_step() -> None:
    seen: list[RouterProgress] = []
    examples = split(labelled_examples())
    train_router(examples, threshold=THRESHOLD, recipe=RECIPE, on_progress=seen.append)
    steps_per_epoch = -(-len(examples.train) // RECIPE.batch_prompts)
    assert [progress.step for progress in seen] == list(range(1, RECIPE.epochs * steps_per_epoch + 1))
    assert {progress.num_steps for progress in seen} == {len(seen)}


def test_an_epoch_shows_mixed_prompts_as_often_as_it_is_told() -> None:
    examples = split(examples_of(discovered_prompts()))
    num_mixed = int((examples.train.prompts.positive.sum(dim=1) > 1).sum())
    for weight in (1, 3):
        seen: list[RouterProgress] = []
        recipe = dataclasses.replace(RECIPE, epochs=1, batch_prompts=4, mixed_weight=weight)
        train_router(examples, threshold=THRESHOLD, recipe=recipe, on_progress=seen.append)
        assert len(seen) == -(-(len(examples.train) + (weight - 1) * num_mixed) // 4)


def test_features_may_be_kept_in_half_precision() -> None:
    examples = labelled_examples()
    half = RouterExamples(examples.prompts, [features.half() for features in examples.features])
    assert train(split(half)).metrics.top1 == 1.0


def test_soft_targets_are_learnt() -> None:
    examples = labelled_examples()
    prompts = dataclasses.replace(examples.prompts, targets=examples.prompts.targets * 0.8 + 0.05)
    recipe = dataclasses.replace(RECIPE, epochs=20, margin_weight=0.0)
    trained = train(split(RouterExamples(prompts, examples.features)), recipe)
    score = router_of(trained.network).route("the loop of string").scores["code"]
    assert score == pytest.approx(0.85, abs=0.1)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    with pytest.raises(TrainingDiverged, match="loss is nan at step 1 of"):
        train(with_features(labelled_examples(), torch.nan))


def test_the_loss_is_cross_entropy_plus_margin() -> None:
    logits, targets = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.5]])
    p = [0.5, 1 / (1 + torch.exp(torch.tensor(-3.0)).item())]
    cross_entropy = (
        -(torch.tensor(p[0]).log() + 0.5 * torch.tensor(p[1]).log() + 0.5 * torch.tensor(1 - p[1]).log()) / 2
    )
    margin = (0.3 + max(0.3 - abs(p[1] - 0.5), 0)) / 2
    expected = cross_entropy + 0.05 * margin
    torch.testing.assert_close(router_loss(logits, targets, margin=0.3, margin_weight=0.05), expected)


def test_a_wrong_recipe_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="epochs must be above 0, not 0"):
        RouterRecipe(epochs=0)
    with pytest.raises(ValueError, match="mixed_weight must be above 0, not 0"):
        RouterRecipe(mixed_weight=0)
