"""Trains the domains of a recipe and writes their stacks. Knows files, recipes and the store, not the inner loop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.model.base import Base
from engine.model.moe_lora import MoeLoraConfig
from stack_store.format import StackHeader, pack_groups, write_stack
from training.data import Example, Record, read_records, render, split_records
from training.errors import BadRecord
from training.recipe import DomainSection, Recipe
from training.stack_training import Progress, TrainedStack, train_stack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DomainData:
    """A domain's rendered examples, and how many records were too long to use whole."""

    train: list[Example]
    held_out: list[Example]
    too_long: int


@dataclass(frozen=True, slots=True)
class DomainReport:
    """What training one domain did; losses are token-weighted means over the answers of held-out records."""

    domain: str
    train_records: int
    held_out_records: int
    too_long: int
    base_loss: float
    stack_loss: float
    steps_run: int
    validation_losses: tuple[tuple[int, float], ...]
    expert_share_range: tuple[float, float]
    seconds: float


def domain_records(recipe: Recipe, domain: DomainSection) -> tuple[list[Record], list[Record]]:
    """A domain's training and held-out records, split by prompt with the recipe's seed."""
    records = [record for name in domain.files for record in read_records(recipe.folder / name)]
    train, held_out = split_records(records, held_out=domain.held_out, seed=recipe.settings.seed)
    return train[: domain.max_records], held_out


def load_domain_data(base: Base, recipe: Recipe, domain: DomainSection) -> DomainData:
    """Renders a domain's records. A record longer than the limit is left out, counted and reported, never cut."""
    limit = recipe.settings.training.max_example_tokens
    train, held_out = ([render(base.tokenizer, r) for r in records] for records in domain_records(recipe, domain))
    fitting = [[e for e in examples if len(e.token_ids) <= limit] for examples in (train, held_out)]
    if not all(fitting):
        raise BadRecord(f"domain {domain.name!r}: no record of at most {limit} tokens on one side of the split")
    return DomainData(fitting[0], fitting[1], len(train) + len(held_out) - sum(map(len, fitting)))


def train_domain(
    base: Base, recipe: Recipe, domain: DomainSection, data: DomainData, on_progress: Callable[[Progress], None]
) -> TrainedStack:
    """Trains the domain's first stack with the base alone around it."""
    shape = recipe.settings.stack
    return train_stack(
        base,
        data.train,
        data.held_out,
        config=MoeLoraConfig(shape.num_experts, shape.rank, shape.top_k, shape.alpha),
        settings=recipe.settings.training,
        seed=recipe.settings.seed,
        on_progress=on_progress,
    )


def save_stack(base: Base, recipe: Recipe, domain: DomainSection, trained: TrainedStack, path: Path) -> str:
    """Writes a trained stack in the store's format; returns its digest."""
    config = trained.stack.config
    header = StackHeader(
        base_fingerprint=base.fingerprint,
        geometry=base.geometry,
        num_experts=config.num_experts,
        rank=config.rank,
        top_k=config.top_k,
        scale=config.scale,
        domain=domain.name,
        round=1,
        recipe_digest=recipe.digest,
        null_space_folded=False,
        weights=recipe.settings.stack.weights,
    )
    return write_stack(path, header, pack_groups(header, trained.stack.projections(base.geometry.num_layers)))
