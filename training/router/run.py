"""Trains a store's router, measures it and registers it. Knows the order of things, not the network."""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.model.base import Base
from router.checkpoint import RouterCheckpoint
from stack_store.registry import StackRegistry
from training.data.chat_tokens import special_tokens
from training.data.preparation import prepare_data
from training.data.records import normalise_text
from training.errors import DataUnusable
from training.recipe import Recipe
from training.reports import report_path, write_report
from training.router.calibration import calibration_of
from training.router.examples import RouterExamples, SplitExamples, split_examples
from training.router.features import FeatureReader, feature_cache_path, feature_settings
from training.router.gap_calibration import calibrate_gap, gap_prompts
from training.router.learning import BestEpoch, RouterRecipe, train_router
from training.router.metrics import label_top1, measure, predict_logits
from training.router.reports import (
    ROUTER_REPORT,
    GapReport,
    RouterEvaluation,
    RouterMetrics,
    RouterReport,
)
from training.router.store_router import register_router, routing_policy, stack_digests
from training.router.target_kind import TargetKind
from training.router.targets import ChosenPrompts, choose_prompts, outcomes_to_learn
from training.router.watch import Watch

Trained = Mapping[TargetKind, BestEpoch[RouterMetrics]]


def train_store_router(
    recipe: Recipe, base: Base, store: Path, *, wanted: TargetKind | None = None, watch: Watch | None = None
) -> RouterReport:
    """Trains a router of the recipe's domains, makes it the store's, and writes its report.

    It learns outcomes if the store has some, unless labels are wanted; then a second router learns the labels of the
    same prompts, to be compared with. Raises RecipeInvalid if the store lacks a domain of the recipe.
    """
    watch, section = watch or Watch(), recipe.settings.router
    with closing(StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)) as registry:
        domains = [domain.name for domain in recipe.settings.domains]
        digests = stack_digests(registry, domains)
        outcomes = outcomes_to_learn(store, wanted)
        data = prepare_data(recipe, own_tokens=special_tokens(base.tokenizer))
        chosen = choose_prompts(data, domains, prompts_per_domain=section.prompts_per_domain, outcomes=outcomes)
        texts_for_gap = gap_prompts(recipe, data)  # before anything is computed, since it may be unsound
        reader = FeatureReader(base, feature_settings(base), feature_cache_path(store))
        searched, rest = chosen.prompts, chosen.unsearched
        features = reader.read([*searched.texts, *rest.texts], watch.on_prompt)
        split = split_of(recipe, RouterExamples(searched, features[: len(searched.texts)]))
        if section.unsearched == "label":
            split = split.with_more(RouterExamples(rest, features[len(searched.texts) :]))
        trained = _train(recipe, split, chosen.kind, watch)
        network = trained[chosen.kind].network
        gap = calibrate_gap(
            recipe,
            network,
            validation=split.validation.features,
            prompts=texts_for_gap,
            reader=reader,
            on_prompt=watch.on_prompt,
        )
        report = _report(chosen, split, trained, gap, threshold=section.threshold)
        policy = replace(routing_policy(recipe), gap_threshold=gap.threshold)
        register_router(RouterCheckpoint(network, reader.settings, policy, digests, base.fingerprint), registry)
    write_report(report_path(store, ROUTER_REPORT), report)
    return report


def router_recipe(recipe: Recipe) -> RouterRecipe:
    """The numbers of a recipe's router training."""
    section = recipe.settings.router
    return RouterRecipe(
        epochs=section.epochs,
        batch_prompts=section.batch_size,
        learning_rate=section.learning_rate,
        mixed_weight=section.mixed_weight,
        seed=recipe.settings.seed,
    )


def split_of(recipe: Recipe, examples: RouterExamples) -> SplitExamples:
    """The recipe's split of a router's prompts. Raises DataUnusable if there is one prompt only."""
    if len({normalise_text(text) for text in examples.prompts.texts}) < 2:
        raise DataUnusable(f"a router needs prompts to learn from and others to validate, not {len(examples)} alike")
    share = recipe.settings.router.validation_share
    return split_examples(examples, validation_share=share, seed=recipe.settings.seed)


def _train(recipe: Recipe, split: SplitExamples, kind: TargetKind, watch: Watch) -> Trained:
    """The router that is wanted and, if that is not the one of the labels, that one too."""
    sides = {kind: split}
    if kind is not TargetKind.LABELS:
        sides[TargetKind.LABELS] = split.by_label()
    threshold = recipe.settings.router.threshold
    return {
        name: train_router(
            side, threshold=threshold, recipe=router_recipe(recipe), on_progress=partial(watch.on_step, name)
        )
        for name, side in sides.items()
    }


def _report(
    chosen: ChosenPrompts, split: SplitExamples, trained: Trained, gap: GapReport, *, threshold: float
) -> RouterReport:
    labels, unsearched = Counter(chosen.prompts.labels), Counter(chosen.unsearched.labels)
    return RouterReport(
        targets=chosen.kind,
        num_train=len(split.train),
        num_validation=len(split.validation),
        prompts={name: labels[name] for name in chosen.prompts.domains},
        unsearched_prompts={name: unsearched[name] for name in chosen.prompts.domains},
        routers={kind: _evaluate(best, split.validation, threshold) for kind, best in trained.items()},
        gap=gap,
    )


def _evaluate(best: BestEpoch[RouterMetrics], validation: RouterExamples, threshold: float) -> RouterEvaluation:
    """Against the targets that the run is about, whatever the router learnt."""
    logits, prompts = predict_logits(best.network, validation.features), validation.prompts
    return RouterEvaluation(
        label_top1=label_top1(logits, prompts),
        metrics=measure(logits, prompts, threshold=threshold),
        calibration=calibration_of(logits.sigmoid().flatten(), prompts.positive.flatten()),
        best_epoch=best.best_epoch,
    )
