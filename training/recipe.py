"""What a training run is: one TOML file, read once, checked, frozen. Knows no tensors."""

import hashlib
import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stack_store.errors import DomainNameInvalid
from stack_store.manifest import require_domain_name
from training.errors import RecipeInvalid

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

Settings = TypeVar("Settings", bound=BaseModel)
RESERVED_NAMES = ("data", "discovery", "evaluation", "forgetting", "subspaces", "router", "router_extension", "recipe")
INT8_MAX_SHARE = 0.14  # training/rounding.py has the measurement


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSection(_Section):
    """The base to train on; nothing names the embedded default."""

    spec: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class StackSection(_Section):
    """The shape of every stack of the run, and how its weights are stored. One expert makes it a plain LoRA."""

    kind: Literal["moe_lora"] = "moe_lora"
    num_experts: Positive = 4
    rank: Positive = 16
    top_k: Positive = 2
    alpha: PositiveFloat = 16.0
    weights: Literal["bf16", "int8"] = "bf16"


class DataSection(_Section):
    """What happens to records before they are rendered."""

    strip_chat_tokens: bool = True
    deduplicate: bool = True
    decontaminate: bool = False
    max_bad_share: Share = 0.0  # of one source's records; a run with more of them fails


class TrainingSection(_Section):
    """The loops (Brainstacks paper, sections 3.3 and 3.4)."""

    rounds: Positive = 1  # at most, for each domain
    min_gain: Annotated[float, Field(ge=0.0)] = 0.002  # a round that gains less is dropped and is the last
    context: Literal["all", "isolated", "sampled"] = "isolated"
    steps: Positive = 400
    tokens_per_step: Positive = 1024
    tokens_per_pass: Positive | None = None  # of one forward and backward; more passes make a step. None: all at once
    packing: bool = False
    gradient_checkpointing: bool = False
    max_example_tokens: Positive = 512
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # None: a tenth of the steps
    clip_norm: PositiveFloat = 1.0
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.01
    eval_every: Positive = 50
    patience: Positive = 4
    spike: PositiveFloat = 0.1

    @property
    def max_pass_tokens(self) -> int:
        """What one forward may hold, in training and in evaluation alike."""
        return self.tokens_per_pass or self.tokens_per_step


class NullSpaceSection(_Section):
    """Which output directions of earlier domains a new stack may not use (section 3.5)."""

    enabled: bool = True
    samples: Positive = 400  # of each earlier domain's held-out examples, at most
    directions: Positive = 64  # that each domain claims, per projection, at most
    max_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.125  # of a projection's outputs, for all domains together


class DiscoverySection(_Section):
    """How the combination of domains is found that answers a prompt best (section 3.6)."""

    prompts_per_domain: Positive = 100  # of its training records
    search: Literal["greedy", "exhaustive"] = "greedy"
    threshold: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.01  # nats a token that each member must gain
    soft_domains: tuple[str, ...] | None = None  # default: reasoning, if it is a domain of the recipe


class RouterSection(_Section):
    """The router, its policy, and how its gap signal is calibrated."""

    prompts_per_domain: Positive = 300  # at most
    unsearched: Literal["label", "leave_out"] = (
        "label"  # what is learnt of prompts without an outcome, if others have one
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1  # of the prompts; chooses the best epoch
    epochs: Positive = 8
    batch_size: Positive = 16
    learning_rate: PositiveFloat = 8e-4
    extend_learning_rate: PositiveFloat = 8e-3  # of the one query that adds a domain
    mixed_weight: Positive = 1  # how often an epoch shows a prompt for which several domains are right
    floor_domain: str | None = None  # default: chat, if it is a domain of the recipe
    floor: Share = 0.20
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.12
    out_of_domain: str | None = None  # JSONL with the field `prompt`; without one the gap signal is not calibrated
    gap_false_alarms: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # share of in-domain prompts that it may flag


class SourceSection(_Section):
    """Records of one domain: a JSONL file beside the recipe, or a dataset of the hub.

    `instruction`, `input` and `output` are Jinja templates over a row's columns; an absent one reads the column of
    its own name. `where` keeps the rows for which it renders to something not empty.
    """

    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    where: str | None = None
    weight: PositiveFloat = 1.0  # share of the domain's max_records, relative to its other sources
    cap: Positive | None = None  # records of this source, at most

    @model_validator(mode="after")
    def _check(self) -> "SourceSection":
        if (self.file is None) == (self.dataset is None):
            raise ValueError(f"a source names either a file or a dataset, got {self.file!r} and {self.dataset!r}")
        if self.file is not None and (self.config, self.split, self.revision) != (None, "train", None):
            raise ValueError(f"config, split and revision belong to a dataset, not to file {self.file!r}")
        return self

    @property
    def name(self) -> str:
        """How reports call it."""
        return self.file or f"{self.dataset}{f'/{self.config}' if self.config else ''}:{self.split}"


class DomainSection(_Section):
    """One domain: its name, where its records come from, and what differs from [training] for it."""

    name: str
    files: tuple[str, ...] = ()  # short for one [[domains.sources]] each
    sources: tuple[SourceSection, ...] = ()
    held_out: Positive = 40
    max_records: Positive | None = None  # to train on; needed for weights to mean something
    keywords: tuple[str, ...] = ()  # regular expressions that tell this domain's records, for decontamination
    rounds: Positive | None = None
    steps: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "DomainSection":
        if not self.all_sources:
            raise ValueError(f"domain {self.name!r} names neither files nor sources")
        if self.max_records is None and len({source.weight for source in self.all_sources}) > 1:
            raise ValueError(f"domain {self.name!r} weighs its sources; weights need max_records")
        return self

    @property
    def all_sources(self) -> tuple[SourceSection, ...]:
        """Every source, those of `files` first."""
        return (*(SourceSection(file=name) for name in self.files), *self.sources)


class RecipeFile(_Section):
    """The whole file. Domains train in the order in which they stand: the curriculum."""

    seed: int = 42
    base: BaseSection = BaseSection()
    stack: StackSection = StackSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    null_space: NullSpaceSection = NullSpaceSection()
    discovery: DiscoverySection = DiscoverySection()
    router: RouterSection = RouterSection()
    domains: Annotated[tuple[DomainSection, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "RecipeFile":
        names = [domain.name for domain in self.domains]
        for name in names:
            require_domain_name(name)
        if self.router.floor_domain not in (None, *names):
            raise ValueError(f"router.floor_domain {self.router.floor_domain!r} is none of the domains {names}")
        unknown = [name for name in self.discovery.soft_domains or () if name not in names]
        if unknown:
            raise ValueError(f"discovery.soft_domains {unknown} are none of the domains {names}")
        reserved = [name for name in names if name in RESERVED_NAMES]
        if reserved:
            raise ValueError(f"domain name {reserved[0]!r} is taken: a report of the run is called so")
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"domain names repeat: {sorted(repeated)}")
        warmup = self.training.warmup_steps
        for steps in (self.training.steps, *(domain.steps for domain in self.domains if domain.steps)):
            if warmup is not None and warmup >= steps:
                raise ValueError(f"training.warmup_steps is {warmup}: of {steps} steps none would have the full rate")
        if (self.training.tokens_per_pass or 0) > self.training.tokens_per_step:
            raise ValueError(
                f"training.tokens_per_pass {self.training.tokens_per_pass} is more than "
                f"training.tokens_per_step {self.training.tokens_per_step}"
            )
        if self.stack.weights == "int8" and self.null_space.enabled and self.null_space.max_share > INT8_MAX_SHARE:
            raise ValueError(
                f"null_space.max_share is {self.null_space.max_share}: rounding to int8 would put more than 1e-6 of a "
                f"stack's energy back into the protected directions; int8 allows {INT8_MAX_SHARE}"
            )
        if self.data.decontaminate and any(not domain.keywords for domain in self.domains):
            bare = [domain.name for domain in self.domains if not domain.keywords]
            raise ValueError(f"data.decontaminate needs the keywords of every domain; {bare} have none")
        if self.stack.top_k > self.stack.num_experts:
            raise ValueError(f"stack.top_k {self.stack.top_k} is more than stack.num_experts {self.stack.num_experts}")
        return self


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file, its text, and the folder that its paths are seen from."""

    settings: RecipeFile
    folder: Path
    text: str

    def domain_digest(self, index: int) -> str:
        """sha256 in hex of all that the index-th domain's stacks depend on: settings, files, and the domains before.

        What comes later in the recipe, discovery and the router are not in it: a domain added at the end leaves the
        others be.
        Decontamination moves records between all domains, so with it they are all in.
        """
        settings = self.settings
        domains = settings.domains if settings.data.decontaminate else settings.domains[: index + 1]
        content = settings.model_dump(mode="json", exclude={"router", "discovery", "domains"})
        content["domains"] = [domain.model_dump(mode="json") for domain in domains]
        content["files"] = [
            hashlib.sha256((self.folder / source.file).read_bytes()).hexdigest()
            for domain in domains
            for source in domain.all_sources
            if source.file is not None
        ]
        content["domain"] = settings.domains[index].name
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe. Raises RecipeInvalid that names file, setting and value."""
    settings, text = read_toml(path, RecipeFile)
    for source in (source for domain in settings.domains for source in domain.all_sources):
        if source.file is not None and not (path.parent / source.file).is_file():
            raise RecipeInvalid(f"{path}: there is no file {str(path.parent / source.file)!r}")
    out_of_domain = settings.router.out_of_domain
    if out_of_domain is not None and not (path.parent / out_of_domain).is_file():
        raise RecipeInvalid(f"{path}: router.out_of_domain: there is no file {str(path.parent / out_of_domain)!r}")
    return Recipe(settings, path.parent, text)


def read_toml(path: Path, kind: type[Settings]) -> tuple[Settings, str]:
    """The settings of a TOML file and its text. Raises RecipeInvalid that names file, setting and value."""
    try:
        text = path.read_text(encoding="utf-8")
        return kind.model_validate(tomllib.loads(text)), text
    except UnicodeDecodeError as error:
        raise RecipeInvalid(f"{path}: not UTF-8: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeInvalid(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        raise RecipeInvalid(f"{path}: {name_faults(error)}") from error
    except DomainNameInvalid as error:
        raise RecipeInvalid(f"{path}: {error}") from error


def name_faults(error: ValidationError) -> str:
    """Every setting at fault, what is wrong with it, and its value."""
    return "; ".join(_fault(e["loc"], e["msg"], e["input"]) for e in error.errors())


def _fault(location: tuple[int | str, ...], message: str, value: Any) -> str:
    # A section's own check names its values; the whole section beside it would only hide them.
    shown = "" if isinstance(value, dict) else f", got {value!r}"
    return ": ".join(filter(None, (".".join(map(str, location)), f"{message}{shown}")))


def with_base(recipe: Recipe, spec: str | None) -> Recipe:
    """The recipe on another base; None leaves it as it is."""
    if spec is None:
        return recipe
    base = recipe.settings.base.model_copy(update={"spec": spec})
    return replace(recipe, settings=recipe.settings.model_copy(update={"base": base}))
