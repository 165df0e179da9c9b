"""A whole training run: every domain of a recipe into one store, then the router. Knows the order of things."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engine.model.base import Base, load_base
from engine.model.hidden import hidden_states
from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings, token_features
from router.policy import RoutingPolicy
from stack_store.manifest import Manifest
from stack_store.registry import StackRegistry
from training.domain_training import DomainReport, domain_records, load_domain_data, save_stack, train_domain
from training.errors import RecipeInvalid
from training.recipe import DomainSection, Recipe
from training.router_data import label_targets
from training.router_training import RouterExamples, RouterProgress, RouterRecipe, TrainedRouter, train_router
from training.stack_training import Progress, TrainedStack

REPORTS_FOLDER = "reports"
DEFAULT_FLOOR_DOMAIN = "chat"


def load_training_base(recipe: Recipe) -> Base:
    """The recipe's base with NF4 values in dense memory: packed NF4 loses its gradient on a CPU after an evaluation."""
    section = recipe.settings.base
    return load_base(section.spec, base_format="nf4-dense", dtype=section.dtype)


def open_or_create_store(path: Path, base: Base) -> StackRegistry:
    """The store at a path, made if there is none."""
    if (path / "manifest.json").exists():
        return StackRegistry.open(path, base_fingerprint=base.fingerprint, geometry=base.geometry)
    return StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry)


def trained_domains(registry: StackRegistry, recipe: Recipe) -> set[str]:
    """The domains whose stacks this very recipe already trained; a run goes on behind them."""
    return {
        entry.name
        for entry in registry.manifest.domains
        if all(registry.header(stack).recipe_digest == recipe.digest for stack in entry.stacks)
    }


def run_domain(
    base: Base, recipe: Recipe, domain: DomainSection, registry: StackRegistry, on_progress: Callable[[Progress], None]
) -> DomainReport:
    """Trains one domain, registers its stack and writes its report into the store."""
    data = load_domain_data(base, recipe, domain)
    started = time.monotonic()
    trained = train_domain(base, recipe, domain, data, on_progress)
    report = DomainReport(
        domain=domain.name,
        train_records=len(data.train),
        held_out_records=len(data.held_out),
        too_long=data.too_long,
        base_loss=trained.base_loss,
        stack_loss=trained.best_loss,
        steps_run=trained.steps_run,
        validation_losses=trained.validation_losses,
        expert_share_range=trained.expert_share_range,
        seconds=round(time.monotonic() - started, 1),
    )
    register_trained(base, recipe, domain, trained, registry)
    write_report(registry.path, domain.name, asdict(report))
    return report


def register_trained(
    base: Base, recipe: Recipe, domain: DomainSection, trained: TrainedStack, registry: StackRegistry
) -> None:
    """Puts a trained stack into the store as its domain's first round."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{domain.name}.safetensors"
        save_stack(base, recipe, domain, trained, path)
        registry.register_domain(domain.name, [path])


def write_report(store: Path, name: str, content: object) -> None:
    """Writes a report beside the manifest, for people."""
    folder = store / REPORTS_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def router_examples(
    base: Base, recipe: Recipe, settings: FeatureSettings, on_prompt: Callable[[int, int], None]
) -> RouterExamples:
    """Features and label targets of each domain's training prompts. Held-out records stay out."""
    chosen = [
        (record.prompt, domain.name)
        for domain in recipe.settings.domains
        for record in domain_records(recipe, domain)[0][: recipe.settings.router.prompts_per_domain]
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
