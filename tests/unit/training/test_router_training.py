"""Facts about router training: what it learns, what it measures, what it keeps apart. Legend: N prompts, D domains."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings, token_features
from router.network import MetaRouter
from router.policy import RoutingPolicy
from router.router import Router
from tests.fakes import TableHiddenStates, word_tokenizer
from training.data.records import normalise_text
from training.errors import TrainingDiverged
from training.router_data import label_targets, split_by_prompt
from training.router_training import (
    RouterExamples,
    RouterProgress,
    RouterRecipe,
    TrainedRouter,
    evaluate_router,
    router_loss,
    train_router,
)

DOMAINS = ("chat", "code", "math")
WORDS = {"chat": ["hello", "thanks", "joke"], "code": ["loop", "class", "string"], "math": ["sum", "root", "prime"]}
FILLERS = ["the", "a", "of", "is"]
TOKENIZER = word_tokenizer([*FILLERS, *(word for words in WORDS.values() for word in words)])
HIDDEN_STATES = TableHiddenStates(num_token_ids=len(TOKENIZER), hidden_size=12)
SETTINGS = FeatureSettings(mid_layer=1, max_tokens=16)
RECIPE = RouterRecipe(epochs=16, batch_prompts=8, learning_rate=8e-3, validation_share=0.2, hidden_dim=16)


def separable_examples() -> RouterExamples:
    """Every domain has words of its own among words that all domains share."""
    texts = [
        f"{first} {word} {second} {WORDS[domain][i % 3]}"
        for domain in DOMAINS
        for word in WORDS[domain]
        for i, (first, second) in enumerate(itertools.product(FILLERS, FILLERS[:3]))
    ]
    labels = [domain for domain in DOMAINS for _ in range(36)]
    features = [
        token_features(text, tokenizer=TOKENIZER, hidden_states=HIDDEN_STATES, settings=SETTINGS) for text in texts
    ]
    return RouterExamples(DOMAINS, texts, features, label_targets(labels, DOMAINS))


def train(examples: RouterExamples, recipe: RouterRecipe = RECIPE) -> TrainedRouter:
    return train_router(examples, policy=RoutingPolicy(), recipe=recipe)


def router_of(network: MetaRouter) -> Router:
    return Router(
        network=network,
        settings=SETTINGS,
        policy=RoutingPolicy(),
        tokenizer=TOKENIZER,
        hidden_states=HIDDEN_STATES,
    )


def test_separable_prompts_are_learnt() -> None:
    trained = train(separable_examples())
    assert trained.metrics.top1 == 1.0
    assert trained.metrics.set_match > 0.9
    assert trained.history[0].bce > trained.metrics.bce
    assert all(metrics.recall == 1.0 for metrics in trained.metrics.domains.values())


def test_a_trained_router_routes_identically_after_loading(tmp_path: Path) -> None:
    examples = separable_examples()
    network = train(examples).network
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
    assert [after.route(text) for text in examples.texts] == [before.route(text) for text in examples.texts]
    assert before.route("the loop of string").mix.keys() == {"chat", "code"}
    assert before.route("a prime is root").mix["math"] > 0.5


def test_the_seed_decides_the_result() -> None:
    examples = separable_examples()
    recipe = dataclasses.replace(RECIPE, epochs=2)
    first, second = train(examples, recipe), train(examples, recipe)
    other = train(examples, dataclasses.replace(recipe, seed=7))
    assert first.history == second.history
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name])
    assert not torch.equal(first.network.global_query, other.network.global_query)


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    train(separable_examples(), dataclasses.replace(RECIPE, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_epoch_is_kept() -> None:
    examples = separable_examples()
    trained = train(examples, dataclasses.replace(RECIPE, learning_rate=0.3, epochs=5))  # So large that it jumps about.
    scores = [metrics.selection_score for metrics in trained.history]
    assert trained.best_epoch == scores.index(max(scores)) + 1
    assert trained.metrics == trained.history[trained.best_epoch - 1]
    _, validation_rows = split_by_prompt(examples.texts, validation_share=0.2, seed=RECIPE.seed)
    again = evaluate_router(trained.network, examples.select(validation_rows), policy=RoutingPolicy())
    assert again == trained.metrics


def test_progress_tells_every_step_and_ends_each_epoch_with_metrics() -> None:
    seen: list[RouterProgress] = []
    trained = train_router(separable_examples(), policy=RoutingPolicy(), recipe=RECIPE, on_progress=seen.append)
    steps_per_epoch = -(-trained.num_train // RECIPE.batch_prompts)
    assert [progress.step for progress in seen] == list(range(1, RECIPE.epochs * steps_per_epoch + 1))
    assert {progress.num_steps for progress in seen} == {len(seen)}
    assert tuple(progress.metrics for progress in seen if progress.metrics) == trained.history
    assert [progress.epoch for progress in seen if progress.metrics] == list(range(1, RECIPE.epochs + 1))


def test_features_may_be_kept_in_half_precision() -> None:
    examples = separable_examples()
    half = dataclasses.replace(examples, features=[features.half() for features in examples.features])
    assert train(half).metrics.top1 == 1.0


def test_soft_targets_are_learnt() -> None:
    examples = separable_examples()
    soft = examples.targets * 0.8 + 0.05
    trained = train(
        dataclasses.replace(examples, targets=soft), dataclasses.replace(RECIPE, epochs=20, margin_weight=0.0)
    )
    score = router_of(trained.network).route("the loop of string").scores["code"]
    assert score == pytest.approx(0.85, abs=0.1)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    examples = separable_examples()
    broken = dataclasses.replace(examples, features=[features * torch.nan for features in examples.features])
    with pytest.raises(TrainingDiverged, match="loss is nan at step 1 of"):
        train(broken)


def test_the_loss_is_cross_entropy_plus_margin() -> None:
    logits, targets = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.5]])
    p = [0.5, 1 / (1 + torch.exp(torch.tensor(-3.0)).item())]
    cross_entropy = (
        -(torch.tensor(p[0]).log() + 0.5 * torch.tensor(p[1]).log() + 0.5 * torch.tensor(1 - p[1]).log()) / 2
    )
    margin = (0.3 + max(0.3 - abs(p[1] - 0.5), 0)) / 2
    expected = cross_entropy + 0.05 * margin
    torch.testing.assert_close(router_loss(logits, targets, margin=0.3, margin_weight=0.05), expected)


class FixedLogits(MetaRouter):
    """Answers with given logits, a row per prompt in order, so that metrics can be counted by hand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(1, DOMAINS, hidden_dim=2)
        self.logits = logits

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.logits[features[:, 0, 0].long()]


def test_metrics_equal_a_count_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.05], [0.6, 0.3, 0.01], [0.1, 0.1, 0.1], [0.3, 0.2, 0.8], [0.02, 0.01, 0.03]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]])
    examples = RouterExamples(DOMAINS, list("abcde"), [torch.full((1, 1), float(row)) for row in range(5)], targets)
    metrics = evaluate_router(FixedLogits(scores.logit()), examples, policy=RoutingPolicy(), batch_prompts=2)
    assert metrics.top1 == 2 / 4  # a and d; b chose chat, c has a tie of which the first is wrong, e has no domain.
    assert metrics.set_match == pytest.approx(2 / 5)  # a and e.
    assert metrics.bce == pytest.approx(functional.binary_cross_entropy(scores, targets).item(), rel=1e-5)
    chat, code, math = (metrics.domains[name] for name in DOMAINS)
    assert (chat.precision, chat.recall, chat.num_positive) == (2 / 3, 1.0, 2)
    assert (code.precision, code.recall, code.num_positive) == (1 / 2, 1.0, 1)
    assert (math.precision, math.recall, math.num_positive) == (1.0, 1 / 2, 2)
    assert metrics.selection_score == pytest.approx(0.5 * 0.5 + 0.35 * 0.4 - 0.15 * metrics.bce)


def test_a_ratio_of_nothing_is_none() -> None:
    examples = RouterExamples(DOMAINS, ["a"], [torch.zeros(1, 1)], torch.zeros(1, 3))
    metrics = evaluate_router(FixedLogits(torch.full((1, 3), -9.0)), examples, policy=RoutingPolicy())
    assert metrics.domains["chat"].precision is None
    assert metrics.domains["chat"].recall is None
    assert (metrics.top1, metrics.set_match) == (0.0, 1.0)


def test_a_router_is_measured_on_its_own_domains_only() -> None:
    examples = dataclasses.replace(separable_examples(), domains=("code", "chat", "math"))
    with pytest.raises(ValueError, match="cannot measure a router of"):
        evaluate_router(MetaRouter(12, DOMAINS, hidden_dim=4), examples, policy=RoutingPolicy())


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


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['law'\] are not among the domains"):
        label_targets(["math", "law"], DOMAINS)


def test_examples_that_do_not_fit_together_are_refused() -> None:
    features = [torch.ones(2, 3), torch.ones(1, 3)]
    with pytest.raises(ValueError, match=r"equally many, not \(1, 2, 2\)"):
        RouterExamples(DOMAINS, ["a"], features, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"targets of 3 domains cannot have shape \(2, 4\)"):
        RouterExamples(DOMAINS, ["a", "b"], features, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="of prompt 1"):
        RouterExamples(DOMAINS, ["a", "b"], features, torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.1, 0.0]]))
    with pytest.raises(ValueError, match=r"features of prompt 1 must be \(T, H\), not \(0, 3\)"):
        RouterExamples(DOMAINS, ["a", "b"], [features[0], torch.ones(0, 3)], torch.zeros(2, 3))


def test_a_wrong_recipe_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="epochs must be above 0, not 0"):
        RouterRecipe(epochs=0)
    with pytest.raises(ValueError, match="validation_share must be between 0 and 1, not 1"):
        RouterRecipe(validation_share=1.0)
