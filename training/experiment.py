"""What a comparison is: a recipe and variants of its settings, each trained from several seeds. Knows no tensors.

An experiment file (TOML) names the recipe, seen from the file's own folder; the domains to train, always in the
recipe's order; and what changes: `[overrides.SECTION]` for all variants, `[variants.NAME.SECTION]` for one. The section
`domain` stands for every domain's own.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stack_store.manifest import DOMAIN_NAME
from training.errors import RecipeInvalid
from training.overrides import Content, merged, with_changes
from training.recipe import Recipe, RecipeFile, name_faults, read_recipe, read_toml
from training.toml_text import as_toml


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"repeated: {repeated}")
    return values


def _folder_name(name: str) -> str:
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError(f"a variant's name is that of a folder and must match {DOMAIN_NAME.pattern}")
    return name


Seed = Annotated[int, Field(strict=True)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
Names = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
VariantName = Annotated[str, AfterValidator(_folder_name)]


class VariantSection(BaseModel):
    """One variant: seeds of its own, and what it changes of the recipe's sections."""

    model_config = ConfigDict(frozen=True, extra="allow")

    seeds: Seeds | None = None

    @property
    def changes(self) -> Content:
        """Section -> setting -> value, not yet checked."""
        return self.model_extra or {}


class ExperimentFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    recipe: str
    seeds: Seeds
    domains: Names | None = None  # None: all of the recipe
    overrides: dict[str, Any] = {}
    variants: Annotated[dict[VariantName, VariantSection], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One variant from one seed: a whole run of a recipe."""

    variant: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Experiment:
    """Which runs are compared: variant by variant, each in the order of its seeds."""

    title: str
    domains: tuple[str, ...]
    runs: tuple[PlannedRun, ...]


def read_experiment(path: Path, *, base_spec: str | None = None) -> Experiment:
    """Reads and checks an experiment and each of its runs' recipes; `base_spec` replaces the base of all.

    Raises RecipeInvalid that names file, variant, setting and value.
    """
    file, _ = read_toml(path, ExperimentFile)
    recipe_path = path.parent / file.recipe
    if not recipe_path.is_file():
        raise RecipeInvalid(f"{path}: recipe: there is no file {str(recipe_path)!r}")
    recipe = read_recipe(recipe_path)
    content = _choose_domains(tomllib.loads(recipe.text), file.domains, path)
    base = {} if base_spec is None else {"base": {"spec": base_spec}}
    runs = tuple(_runs(file, content, base, folder=recipe.folder, path=path))
    return Experiment(file.title, tuple(domain["name"] for domain in content["domains"]), runs)


def _choose_domains(content: Content, chosen: Sequence[str] | None, path: Path) -> dict[str, Any]:
    names = [domain["name"] for domain in content["domains"]]
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        raise RecipeInvalid(f"{path}: domains: the recipe has no domain {unknown[0]!r}; it has {names}")
    kept = [domain for domain in content["domains"] if chosen is None or domain["name"] in chosen]
    return {**content, "domains": kept}


def _runs(file: ExperimentFile, content: Content, base: Content, *, folder: Path, path: Path) -> Iterator[PlannedRun]:
    for name, section in file.variants.items():
        try:
            changed = with_changes(content, merged(file.overrides, section.changes, base))
            settings = RecipeFile.model_validate(changed)
        except ValidationError as error:
            raise RecipeInvalid(f"{path}: variant {name!r}: {name_faults(error)}") from error
        except ValueError as error:
            raise RecipeInvalid(f"{path}: variant {name!r}: {error}") from error
        for seed in section.seeds or file.seeds:
            text = as_toml({**changed, "seed": seed})
            yield PlannedRun(name, seed, Recipe(settings.model_copy(update={"seed": seed}), folder, text))
