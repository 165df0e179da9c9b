"""Trains a recipe's router on domain labels and puts it into the store. Knows the order of things, not the network."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.model.base import Base
from engine.model.hidden import hidden_states
from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings, token_features
from router.policy import RoutingPolicy
from stack_store.manifest import Manifest
from stack_store.registry import StackRegistry
from training.data.chat_tokens import special_tokens
from training.data.preparation import prepare_data
from training.errors import RecipeInvalid
from training.recipe import Recipe
from training.router_data import label_targets
from training.router_training import RouterExamples, RouterProgress, RouterRecipe, TrainedRouter, train_router

DEFAULT_FLOOR_DOMAIN = "chat"


def router_examples(
    base: Base, recipe: Recipe, settings: FeatureSettings, on_prompt: Callable[[int, int], None]
) -> RouterExamples:
    """Features and label targets of each domain's training prompts. Held-out records stay out."""
    prepared = prepare_data(recipe, own_tokens=special_tokens(base.tokenizer))
    chosen = [
        (record.prompt, name)
        for name, records in prepared.domains.items()
        for record in records.train[: recipe.settings.router.prompts_per_domain]
    ]
    features = []
    for index, (text, _) in enumerate(chosen, 1):
        features.append(
            token_features(
                text,
                tokenizer=base.tokenizer,
                hidden_states=lambda ids: hidden_states(base, ids, settings.mid_layer),
                settings=settings,
            )
        )
        on_prompt(index, len(chosen))
    domains = tuple(domain.name for domain in recipe.settings.domains)
    return RouterExamples(
        domains=domains,
        texts=[text for text, _ in chosen],
        features=features,
        targets=label_targets([label for _, label in chosen], domains),
    )


def train_label_router(
    recipe: Recipe, examples: RouterExamples, on_progress: Callable[[RouterProgress], None]
) -> TrainedRouter:
    """A router that learns which domain a prompt came from."""
    section = recipe.settings.router
    return train_router(
        examples,
        policy=routing_policy(recipe),
        recipe=RouterRecipe(
            epochs=section.epochs,
            batch_prompts=section.batch_size,
            learning_rate=section.learning_rate,
            seed=recipe.settings.seed,
        ),
        on_progress=on_progress,
    )


def routing_policy(recipe: Recipe) -> RoutingPolicy:
    """The policy that the router file will carry."""
    section = recipe.settings.router
    floor_domain = section.floor_domain or DEFAULT_FLOOR_DOMAIN  # a policy ignores a floor domain that is not there
    return RoutingPolicy(floor_domain=floor_domain, floor=section.floor, threshold=section.threshold)


def register_router(
    base: Base, recipe: Recipe, settings: FeatureSettings, trained: TrainedRouter, registry: StackRegistry
) -> Manifest:
    """Saves the router with the digests of the stacks it belongs to and makes it the store's router."""
    checkpoint = RouterCheckpoint(
        network=trained.network,
        settings=settings,
        policy=routing_policy(recipe),
        stack_digests={
            domain.name: tuple(stack.digest for stack in registry.domain(domain.name).stacks)
            for domain in recipe.settings.domains
        },
        base_fingerprint=base.fingerprint,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.safetensors"
        checkpoint.save(path)
        return registry.set_router(path)


def feature_settings(base: Base) -> FeatureSettings:
    """The features of section 3.6 of the paper for a base: its middle layer and its last."""
    return FeatureSettings(mid_layer=base.num_layers // 2)


def require_trained(registry: StackRegistry, recipe: Recipe) -> None:
    """Raises RecipeInvalid if the store lacks a domain of the recipe."""
    known = {entry.name for entry in registry.manifest.domains}
    missing = [domain.name for domain in recipe.settings.domains if domain.name not in known]
    if missing:
        raise RecipeInvalid(f"store {registry.path} lacks the domains {missing}; train them first")
