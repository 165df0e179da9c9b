"""Opens what a store's router is made against, and puts a router into the store. Knows files and names, no training."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from router.checkpoint import RouterCheckpoint
from router.policy import RoutingPolicy
from stack_store.registry import StackRegistry
from training.errors import RecipeInvalid
from training.recipe import Recipe

DEFAULT_FLOOR_DOMAIN = "chat"
StackDigests = Mapping[str, tuple[str, ...]]  # domain -> its rounds in order


def routing_policy(recipe: Recipe) -> RoutingPolicy:
    """The policy that the router file will carry, with a gap's threshold that is not calibrated."""
    section = recipe.settings.router
    return RoutingPolicy(
        floor_domain=section.floor_domain or DEFAULT_FLOOR_DOMAIN,  # a policy ignores a floor domain that is not there
        floor=section.floor,
        threshold=section.threshold,
        gap_threshold=section.threshold,
    )


def stack_digests(registry: StackRegistry, domains: Sequence[str]) -> StackDigests:
    """The stacks of these domains as the store has them now. Raises RecipeInvalid if it lacks a domain."""
    known = {entry.name: entry for entry in registry.manifest.domains}
    missing = [name for name in domains if name not in known]
    if missing:
        raise RecipeInvalid(f"store {registry.path} lacks the domains {missing}; train them first")
    return {name: tuple(stack.digest for stack in known[name].stacks) for name in domains}


def register_router(checkpoint: RouterCheckpoint, registry: StackRegistry) -> None:
    """Makes it the store's router."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.safetensors"
        checkpoint.save(path)
        registry.set_router(path)
