"""Opens what a training run works on: the base in a form that trains, and the store. Knows no domains."""

from pathlib import Path

from engine.model.base import Base, load_base
from stack_store.registry import StackRegistry
from training.recipe import Recipe
from training.workers import Workers


def load_training_base(recipe: Recipe, workers: Workers) -> Base:
    """The recipe's base on this worker's device.

    On a CPU its NF4 values are dense: packed, they give no gradient to their input after an evaluation. On CUDA they
    stay packed.
    """
    section = recipe.settings.base
    on_cuda = workers.device.type == "cuda"
    return load_base(
        section.spec,
        base_format="nf4" if on_cuda else "nf4-dense",
        dtype=section.dtype,
        device=str(workers.device),
    )


def make_store(path: Path, base: Base, workers: Workers) -> None:
    """Makes the store if there is none. Raises StackIncompatible if there is one of another base."""
    if workers.is_first:
        if (path / "manifest.json").exists():
            StackRegistry.open(path, base_fingerprint=base.fingerprint, geometry=base.geometry).close()
        else:
            StackRegistry.create(path, base_fingerprint=base.fingerprint, geometry=base.geometry).close()
    workers.wait()
