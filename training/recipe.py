"""What a training run is: one TOML file, read once, checked, frozen. Knows no tensors."""

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stack_store.errors import DomainNameInvalid
from stack_store.manifest import require_domain_name
from training.errors import RecipeInvalid

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSection(_Section):
    """The base to train on; nothing names the embedded default."""

    spec: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class StackSection(_Section):
    """The shape of every stack of the run, and how its weights are stored."""

    num_experts: Positive = 4
    rank: Positive = 16
    top_k: Positive = 2
    alpha: PositiveFloat = 16.0
    weights: Literal["bf16", "int8"] = "bf16"


class TrainingSection(_Section):
    """The inner loop (Brainstacks paper, section 3.3)."""

    steps: Positive = 400
    tokens_per_step: Positive = 1024
    max_example_tokens: Positive = 512
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    clip_norm: PositiveFloat = 1.0
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.01
    eval_every: Positive = 50
    patience: Positive = 4
    spike: PositiveFloat = 0.1


class RouterSection(_Section):
    """The router trained on domain labels."""

    prompts_per_domain: Positive = 300
    epochs: Positive = 8
    batch_size: Positive = 16
    learning_rate: PositiveFloat = 8e-4
    floor_domain: str | None = None  # default: chat, if it is a domain of the recipe
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.20
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.12


class DomainSection(_Section):
    """One domain: its name and its JSONL files, relative to the recipe."""

    name: str
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    held_out: Positive = 40
    max_records: Positive | None = None


class RecipeFile(_Section):
    """The whole file. Domains train in the order in which they stand: the curriculum."""

    seed: int = 42
    base: BaseSection = BaseSection()
    stack: StackSection = StackSection()
    training: TrainingSection = TrainingSection()
    router: RouterSection = RouterSection()
    domains: Annotated[tuple[DomainSection, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "RecipeFile":
        names = [domain.name for domain in self.domains]
        for name in names:
            require_domain_name(name)
        if self.router.floor_domain not in (None, *names):
            raise ValueError(f"router.floor_domain {self.router.floor_domain!r} is none of the domains {names}")
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"domain names repeat: {sorted(repeated)}")
        if self.stack.top_k > self.stack.num_experts:
            raise ValueError(f"stack.top_k {self.stack.top_k} is more than stack.num_experts {self.stack.num_experts}")
        return self


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file, where it lies, and the digest of its text."""

    settings: RecipeFile
    folder: Path
    digest: str


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe. Raises RecipeInvalid that names file, setting and value."""
    text = path.read_bytes()
    try:
        settings = RecipeFile.model_validate(tomllib.loads(text.decode()))
    except tomllib.TOMLDecodeError as error:
        raise RecipeInvalid(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise RecipeInvalid(f"{path}: {faults}") from error
    except DomainNameInvalid as error:
        raise RecipeInvalid(f"{path}: {error}") from error
    for name in (name for domain in settings.domains for name in domain.files):
        if not (path.parent / name).is_file():
            raise RecipeInvalid(f"{path}: there is no file {str(path.parent / name)!r}")
    return Recipe(settings, path.parent, hashlib.sha256(text).hexdigest())
