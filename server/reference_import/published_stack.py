"""Reads one published stack: a flat dict of tensors. Knows its keys and shapes, not files, domains or settings.

Each wrapped projection has the keys `<module>.active_stack.<parameter>`:

    experts.{e}.A.weight   (R, I)     experts.{e}.B.weight  (O, R)
    router.weight          (E, I)     noise_linear.weight   (E, I), which only training uses

`<module>` begins as the version of transformers that trained it named the decoder. A multimodal base was wrapped with
its vision tower, which text never reaches: those keys are dropped and counted.
Legend: E experts, R rank, I in features, O out features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.inject import PARENT_OF_PROJECTION
from server.errors import ReferenceRefused
from server.reference_import.published_tensor import finite_in, require_shape, require_tensor
from stack_store.format import PROJECTIONS, Geometry, ProjectionTensors

# The beginnings are those of transformers from 4.52, of 4.51, and of every text-only model.
TEXT_KEY = re.compile(
    r"(?:model\.language_model|language_model\.model|model)\.layers\.(?P<layer>0|[1-9]\d{0,5})\."
    r"(?P<parent>self_attn|mlp)\.(?P<projection>\w+_proj)\.active_stack\."
    r"(?P<parameter>experts\.(?:0|[1-9]\d{0,5})\.[AB]\.weight|router\.weight|noise_linear\.weight)"
)
VISION_KEY = re.compile(r"(?:model\.)?vision_tower\..+\.active_stack\..+")
NOISE = "noise_linear.weight"
GATE = "router.weight"

Site = tuple[int, str]  # layer, projection
Keys = dict[Site, dict[str, str]]  # parameter -> key, of each projection


@dataclass(frozen=True, slots=True)
class PublishedStack:
    """The text part of a stack, in bfloat16, and how many tensors of the file it has no use for."""

    projections: Mapping[Site, ProjectionTensors]
    num_experts: int
    rank: int
    num_vision_tensors: int
    num_noise_tensors: int


def read_published_stack(file: str, content: object, geometry: Geometry) -> PublishedStack:
    """The stack in an archive's content. `file` names it in messages.

    Raises ReferenceRefused, naming key and value, unless the content is exactly one stack for a base of that geometry:
    every projection once, with the same experts and rank, every value finite in bfloat16.
    """
    if not isinstance(content, dict):
        raise ReferenceRefused(f"{file} holds a {type(content).__name__}, must be a flat dict of tensors")
    vision = [key for key in content if isinstance(key, str) and VISION_KEY.fullmatch(key)]
    keys = _keys_by_site(file, content.keys() - set(vision), geometry)
    num_noise = sum(parameters.pop(NOISE, None) is not None for parameters in keys.values())
    num_experts = _require_parameters(file, keys)
    rank = _rank(file, content, keys[0, PROJECTIONS[0]])
    reader = _Reader(file, content, geometry, num_experts, rank)
    return PublishedStack(
        projections={site: reader.read(site, parameters) for site, parameters in keys.items()},
        num_experts=num_experts,
        rank=rank,
        num_vision_tensors=len(vision),
        num_noise_tensors=num_noise,
    )


def _keys_by_site(file: str, present: set[object], geometry: Geometry) -> Keys:
    """The keys of every projection, in order. ReferenceRefused for a foreign or repeated key or none of a site."""
    keys: Keys = {(layer, name): {} for layer in range(geometry.num_layers) for name in PROJECTIONS}
    for key in sorted(present, key=str):
        layer, projection, parameter = _parse(file, key)
        if layer >= geometry.num_layers:
            raise ReferenceRefused(
                f"{file}: key {key!r} is of layer {layer}, the base has {geometry.num_layers} layers"
            )
        other = keys[layer, projection].setdefault(parameter, str(key))
        if other != key:
            raise ReferenceRefused(f"{file}: keys {other!r} and {key!r} are the same parameter twice")
    for site, parameters in keys.items():
        if not parameters:
            raise ReferenceRefused(f"{file}: projection {_name(site)} is missing")
    return keys


def _parse(file: str, key: object) -> tuple[int, str, str]:
    match = TEXT_KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None or PARENT_OF_PROJECTION.get(match["projection"]) != match["parent"]:
        raise ReferenceRefused(f"{file}: key {key!r} is not that of a stack's parameter")
    return int(match["layer"]), match["projection"], match["parameter"]


def _require_parameters(file: str, keys: Keys) -> int:
    """E, by the first projection. ReferenceRefused unless every projection has the parameters of E experts."""
    first = keys[0, PROJECTIONS[0]]
    num_experts = max(1, len({parameter for parameter in first if parameter.endswith(".A.weight")}))
    expected = {f"experts.{e}.{part}.weight" for e in range(num_experts) for part in "AB"} | {GATE}
    for site, parameters in keys.items():
        if missing := sorted(expected - parameters.keys()):
            raise ReferenceRefused(f"{file}: {_name(site)} lacks {missing[0]} of {num_experts} experts")
        if extra := sorted(parameters.keys() - expected):
            raise ReferenceRefused(f"{file}: key {parameters[extra[0]]!r} is one more than {num_experts} experts have")
    return num_experts


def _rank(file: str, content: Mapping[str, object], parameters: Mapping[str, str]) -> int:
    key = parameters["experts.0.A.weight"]
    tensor = require_tensor(file, key, content[key])
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ReferenceRefused(f"{file}: tensor {key!r} has shape {list(tensor.shape)}, must be (rank, in features)")
    return tensor.shape[0]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the projections of one file."""

    file: str
    content: Mapping[str, object]
    geometry: Geometry
    num_experts: int
    rank: int

    def read(self, site: Site, keys: Mapping[str, str]) -> ProjectionTensors:
        in_features, out_features = self.geometry.shapes[site[1]]
        experts = range(self.num_experts)
        a = [self._tensor(keys[f"experts.{e}.A.weight"], self.rank, in_features) for e in experts]
        b = [self._tensor(keys[f"experts.{e}.B.weight"], out_features, self.rank) for e in experts]
        gate = self._tensor(keys[GATE], self.num_experts, in_features)
        return ProjectionTensors(a=torch.stack(a), b=torch.stack(b), gate=gate)  # (E, R, I), (E, O, R), (E, I)

    def _tensor(self, key: str, *shape: int) -> Tensor:
        tensor = require_tensor(self.file, key, self.content[key])
        require_shape(self.file, key, tensor, shape)
        return finite_in(torch.bfloat16, self.file, key, tensor)


def _name(site: Site) -> str:
    return f"layers.{site[0]}.{PARENT_OF_PROJECTION[site[1]]}.{site[1]}"
