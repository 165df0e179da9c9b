"""Makes a tiny base's store with three random domains and an untrained router, and a recipe with records for them."""

import json
from pathlib import Path

import torch

from engine.model.base import Base
from engine.model.moe_lora import MoeLoraConfig
from router.checkpoint import RouterCheckpoint
from router.features import FeatureSettings
from router.network import MetaRouter
from router.policy import RoutingPolicy
from stack_store.format import pack_groups, write_stack
from stack_store.registry import StackRegistry
from tests.stacks import header_for, random_projections

DOMAINS = ("chat", "math", "reasoning")
CONFIG = MoeLoraConfig(num_experts=4, rank=2, top_k=2)
SENTENCE = "the lazy dog jumps over the quick brown fox and says hello to the world"
WORDS = SENTENCE.split()


def write_domain(registry: StackRegistry, base: Base, folder: Path, domain: str, *, seed: int, rounds: int = 1) -> None:
    """Registers random stacks that change what the base says."""
    paths = []
    for number in range(1, rounds + 1):
        header = header_for(base.geometry, CONFIG, fingerprint=base.fingerprint, domain=domain, round=number)
        weights = random_projections(base.geometry, CONFIG, seed=10 * seed + number, size=0.05)
        paths.append(folder / f"{domain}-{number}.safetensors")
        write_stack(paths[-1], header, pack_groups(header, weights))
    registry.register_domain(domain, paths)


def write_router(registry: StackRegistry, base: Base, folder: Path, *, seed: int = 0) -> None:
    """Makes a random router of all the registry's domains the active one; a random router finds most domains likely."""
    torch.manual_seed(seed)
    digests = {entry.name: tuple(stack.digest for stack in entry.stacks) for entry in registry.manifest.domains}
    RouterCheckpoint(
        network=MetaRouter(base.hidden_size, tuple(digests), hidden_dim=16),
        settings=FeatureSettings(mid_layer=1),
        policy=RoutingPolicy(),
        stack_digests=digests,
        base_fingerprint=base.fingerprint,
    ).save(folder / "router.safetensors")
    registry.set_router(folder / "router.safetensors")


def make_evaluation_store(folder: Path, base: Base, domains: tuple[str, ...] = DOMAINS) -> Path:
    """The store's path; the second domain has two rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = StackRegistry.create(folder / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
    for seed, domain in enumerate(domains, 1):
        write_domain(registry, base, folder, domain, seed=seed, rounds=1 + (seed == 2))
    write_router(registry, base, folder)
    registry.close()
    return folder / "store"


def write_recipe(folder: Path, spec: Path, domains: tuple[str, ...] = DOMAINS, *, records: int = 16) -> Path:
    """A recipe beside its records, a quarter of which are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for place, domain in enumerate(domains):
        lines = [
            {
                "instruction": " ".join([domain, *WORDS[i % 7 : i % 7 + 4], str(i)]),
                "output": " ".join(WORDS[place:][: 2 + i % 5]),
            }
            for i in range(records)
        ]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sections.append(f'[[domains]]\nname = "{domain}"\nfiles = ["{domain}.jsonl"]\nheld_out = {records // 4}\n')
    head = f'[base]\nspec = "{spec}"\n[training]\nmax_example_tokens = 96\n[null_space]\nenabled = false\n'
    (folder / "recipe.toml").write_text("\n".join([head, *sections]))
    return folder / "recipe.toml"
