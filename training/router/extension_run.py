"""Adds a domain to a store's router and registers the result. Knows the order of things, not the network."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from engine.model.base import Base
from router.checkpoint import RouterCheckpoint
from stack_store.registry import StackRegistry
from training.data.chat_tokens import special_tokens
from training.data.preparation import prepare_data
from training.errors import RecipeInvalid, RouterNotExtendable
from training.recipe import Recipe
from training.reports import report_path, write_report
from training.router.examples import RouterExamples, SplitExamples
from training.router.extending import extend_router
from training.router.features import FeatureReader, feature_cache_path
from training.router.learning import BestEpoch, train_router
from training.router.metrics import domain_quality, measure, predict_logits
from training.router.reports import EXTENSION_REPORT, DomainQuality, ExtensionReport, RouterMetrics
from training.router.run import router_recipe, split_of
from training.router.store_router import StackDigests, register_router, stack_digests
from training.router.target_kind import TargetKind
from training.router.targets import choose_prompts, outcomes_to_learn
from training.router.watch import Watch


def extend_store_router(
    recipe: Recipe,
    base: Base,
    store: Path,
    domain: str,
    *,
    wanted: TargetKind | None = None,
    watch: Watch | None = None,
) -> ExtensionReport:
    """Trains one query for the domain, beside it a whole router to compare with, and registers the extended one.

    The policy, the gap's threshold included, stays as it was. Raises RouterNotExtendable or RecipeInvalid.
    """
    watch = watch or Watch()
    with closing(StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)) as registry:
        old = _extendable_router(registry, base, recipe, domain)
        domains = (*old.network.domains, domain)
        digests = stack_digests(registry, domains)
        _require_same_stacks(old, digests, store)
        outcomes = outcomes_to_learn(store, wanted)
        data = prepare_data(recipe, own_tokens=special_tokens(base.tokenizer))
        most = recipe.settings.router.prompts_per_domain
        chosen = choose_prompts(data, domains, prompts_per_domain=most, outcomes=outcomes)
        reader = FeatureReader(base, old.settings, feature_cache_path(store))
        split = split_of(recipe, RouterExamples(chosen.prompts, reader.read(chosen.prompts.texts, watch.on_prompt)))
        extended = _extend(recipe, old, split, domain, watch)
        retrained = _retrain(recipe, old, split, watch)
        report = _report(domain, chosen.kind, split, extended, retrained, threshold=old.policy.threshold)
        register_router(replace(old, network=extended.network, stack_digests=digests), registry)
    write_report(report_path(store, EXTENSION_REPORT), report)
    return report


def _extendable_router(registry: StackRegistry, base: Base, recipe: Recipe, domain: str) -> RouterCheckpoint:
    known = [section.name for section in recipe.settings.domains]
    if domain not in known:
        raise RecipeInvalid(f"the recipe has no domain {domain!r}; it has {known}")
    path = registry.router_path()
    if path is None:
        raise RouterNotExtendable(f"store {registry.path} has no router: train one first")
    old = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
    if domain in old.network.domains:
        raise RouterNotExtendable(f"the router of store {registry.path} knows {domain!r} already")
    missing = [name for name in old.network.domains if name not in known]
    if missing:
        raise RecipeInvalid(f"the router of store {registry.path} knows {missing}, which the recipe lacks")
    return old


def _require_same_stacks(old: RouterCheckpoint, now: StackDigests, store: Path) -> None:
    changed = [name for name in old.network.domains if now[name] != old.stack_digests[name]]
    if changed:
        raise RouterNotExtendable(
            f"the stacks of {changed} in store {store} are others than the router was trained with: "
            "train the router anew"
        )


def _extend(
    recipe: Recipe, old: RouterCheckpoint, split: SplitExamples, domain: str, watch: Watch
) -> BestEpoch[DomainQuality]:
    learning_rate = recipe.settings.router.extend_learning_rate
    return extend_router(
        old.network,
        split,
        domain=domain,
        threshold=old.policy.threshold,
        recipe=replace(router_recipe(recipe), learning_rate=learning_rate),
        on_progress=lambda progress: watch.on_step(f"+ {domain}", progress),
    )


def _retrain(recipe: Recipe, old: RouterCheckpoint, split: SplitExamples, watch: Watch) -> BestEpoch[RouterMetrics]:
    return train_router(
        split,
        threshold=old.policy.threshold,
        recipe=replace(router_recipe(recipe), hidden_dim=old.network.hidden_dim),
        on_progress=lambda progress: watch.on_step("retrained", progress),
    )


def _report(
    domain: str,
    kind: TargetKind,
    split: SplitExamples,
    extended: BestEpoch[DomainQuality],
    retrained: BestEpoch[RouterMetrics],
    *,
    threshold: float,
) -> ExtensionReport:
    features, prompts = split.validation.features, split.validation.prompts
    logits = {
        "extended": predict_logits(extended.network, features),
        "retrained": predict_logits(retrained.network, features),
    }
    qualities = {name: domain_quality(of, prompts, domain, threshold=threshold) for name, of in logits.items()}
    metrics = {name: measure(of, prompts, threshold=threshold) for name, of in logits.items()}
    return ExtensionReport(
        domain=domain,
        targets=kind,
        num_train=len(split.train),
        num_validation=len(split.validation),
        best_epoch=extended.best_epoch,
        extended=qualities["extended"],
        retrained=qualities["retrained"],
        extended_metrics=metrics["extended"],
        retrained_metrics=metrics["retrained"],
    )
