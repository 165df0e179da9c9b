"""What a stack file says about itself, and the shape of the base that it fits. Knows texts and numbers, not tensors.

Legend: I in features, O out features of a projection.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

FORMAT_VERSION = 1
KIND = "moe_lora"
INPUT_GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS = tuple(name for names in INPUT_GROUPS.values() for name in names)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a base: what a stack must fit. Layers are alike, and projections of one input group share I."""

    num_layers: int
    shapes: Mapping[str, tuple[int, int]]  # projection -> (I, O)

    def __post_init__(self) -> None:
        _require_counts(num_layers=self.num_layers)
        if set(self.shapes) != set(PROJECTIONS):
            raise ValueError(f"a geometry has the projections {sorted(PROJECTIONS)}, not {sorted(self.shapes)}")
        for name, (in_features, out_features) in self.shapes.items():
            _require_counts(**{f"{name} in_features": in_features, f"{name} out_features": out_features})
        for group, names in INPUT_GROUPS.items():
            widths = {self.shapes[name][0] for name in names}
            if len(widths) > 1:
                raise ValueError(f"the projections of input group {group!r} differ in in_features: {sorted(widths)}")

    def in_features(self, group: str) -> int:
        return self.shapes[INPUT_GROUPS[group][0]][0]

    def out_features(self, group: str) -> list[int]:
        """O of each projection of the input group, in order."""
        return [self.shapes[name][1] for name in INPUT_GROUPS[group]]


@dataclass(frozen=True, slots=True)
class StackHeader:
    """All that a stack file says about itself. Raises ValueError, naming the field, for an impossible value."""

    base_fingerprint: str
    geometry: Geometry
    num_experts: int
    rank: int
    top_k: int
    scale: float
    domain: str
    round: int  # of residual boosting, from 1
    recipe_digest: str
    null_space_folded: bool
    weights: Literal["bf16", "int8"]
    kind: str = KIND
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _require_counts(num_experts=self.num_experts, rank=self.rank, top_k=self.top_k, round=self.round)
        for field in ("base_fingerprint", "domain", "recipe_digest"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be a text that is not empty")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.num_experts} experts")
        if type(self.scale) not in (int, float) or not 0 < self.scale <= sys.float_info.max:
            raise ValueError(f"scale is {self.scale!r}, must be a positive number")
        if type(self.null_space_folded) is not bool:
            raise ValueError(f"null_space_folded is {self.null_space_folded!r}, must be true or false")
        _require_known("weights", self.weights, ("bf16", "int8"))
        _require_known("kind", self.kind, (KIND,))
        _require_known("format_version", self.format_version, (FORMAT_VERSION,))


def to_metadata(header: StackHeader) -> dict[str, str]:
    """Each field as it stands in the file: texts as they are, the rest as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in asdict(header).items()
    }


def from_metadata(metadata: Mapping[str, str]) -> StackHeader:
    """The inverse of to_metadata. Raises ValueError, naming the field, for one that is missing, unknown or wrong."""
    # Asked first, because a later version may well have other fields.
    _require_known("format_version", metadata.get("format_version"), (str(FORMAT_VERSION),))
    known = {field.name: field.type for field in fields(StackHeader)}
    for problem, names in (("lacks", known.keys() - metadata), ("has the unknown", metadata.keys() - known)):
        if names:
            raise ValueError(f"it {problem} {', '.join(sorted(names))}")
    return StackHeader(**{name: _read_field(name, known[name], text) for name, text in metadata.items()})


def geometry_to_json(geometry: Geometry) -> Any:
    return asdict(geometry)


def geometry_from_json(value: Any) -> Geometry:
    """Raises ValueError, naming what is wrong."""
    match value:
        case {"num_layers": num_layers, "shapes": dict(shapes), **rest} if not rest:
            if all(isinstance(shape, list) and len(shape) == 2 for shape in shapes.values()):
                return Geometry(num_layers, {name: (shape[0], shape[1]) for name, shape in shapes.items()})
    raise ValueError(f"geometry is {value!r}, must have num_layers and shapes")


def _read_field(name: str, kind: Any, text: str) -> Any:
    if kind not in (int, float, bool, Geometry):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {text!r}, which is not JSON") from error
    return geometry_from_json(value) if kind is Geometry else value


def _require_counts(**counts: Any) -> None:
    for name, count in counts.items():
        # `type`, because True is an int too.
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}, must be a whole number from 1")


def _require_known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, this build knows {', '.join(map(str, known))}")
