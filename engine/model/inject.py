"""Finds the language model's projections and wraps them so that stacks can add to them. Knows no stack's mathematics.

Only the decoder's own layers are searched, so the vision tower of a multimodal checkpoint is never touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from engine.errors import BaseUnsupported
from stack_store.format import INPUT_GROUPS, PROJECTIONS

PARENT_OF_PROJECTION = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in PROJECTIONS}


@dataclass(slots=True)
class ProjectionSite:
    """One projection of one layer: where it hangs and what shape it has."""

    layer: int
    projection: str
    path: str
    parent: nn.Module
    in_features: int
    out_features: int

    @property
    def module(self) -> nn.Module:
        """The layer that computes the projection now."""
        module: nn.Module = getattr(self.parent, self.projection)
        return module

    def replace(self, module: nn.Module) -> None:
        """Puts another module in the projection's place."""
        setattr(self.parent, self.projection, module)


class DeltaSource(Protocol):
    """Adds what the active stacks contribute to the projections of one layer."""

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(..., O), (..., I) -> (..., O): the base's output plus the delta of the group's index-th projection."""
        ...


class StackedLinear(nn.Module):
    """A frozen projection plus the deltas of the stacks that a source names; without a source, exactly the base."""

    def __init__(self, base: nn.Module, site: ProjectionSite) -> None:
        super().__init__()
        self.base = base
        self.layer = site.layer
        self.group, self.index = group_of(site.projection)
        self.source: DeltaSource | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y: Tensor = self.base(x)
        return y if self.source is None else self.source.add_delta(y, x, self.layer, self.group, self.index)


def group_of(projection: str) -> tuple[str, int]:
    """The input group of a projection and the projection's place in it."""
    for group, members in INPUT_GROUPS.items():
        if projection in members:
            return group, members.index(projection)
    raise BaseUnsupported(f"{projection!r} is none of the projections {PROJECTIONS}")


def find_projections(model: Any) -> tuple[ProjectionSite, ...]:
    """The seven projections of each decoder layer, in order. Raises BaseUnsupported that names a missing one."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise BaseUnsupported(
            f"{type(model).__name__} has no decoder layers where a Llama, Gemma 3, Qwen or Mistral has"
        )
    return tuple(_site(layer, index, projection) for index, layer in enumerate(layers) for projection in PROJECTIONS)


def _site(layer: nn.Module, index: int, projection: str) -> ProjectionSite:
    parent_name = PARENT_OF_PROJECTION[projection]
    path = f"layers.{index}.{parent_name}.{projection}"
    parent = getattr(layer, parent_name, None)
    module = getattr(parent, projection, None)
    if not isinstance(parent, nn.Module) or not isinstance(module, nn.Module):
        raise BaseUnsupported(f"the base has no projection {path}; stacks need all of {', '.join(PROJECTIONS)}")
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(in_features, int) or not isinstance(out_features, int):
        raise BaseUnsupported(f"{path} is a {type(module).__name__}, not a linear layer")
    return ProjectionSite(index, projection, path, parent, in_features, out_features)


@contextmanager
def injected(sites: tuple[ProjectionSite, ...], source: DeltaSource) -> Iterator[None]:
    """The block runs with the source's deltas; after it the base is alone again, and nothing holds the source."""
    inject(sites, source)
    try:
        yield
    finally:
        for site in sites:
            cast(StackedLinear, site.module).source = None


def inject(sites: tuple[ProjectionSite, ...], source: DeltaSource) -> None:
    """Wraps every projection once and points the wrappers at one source of deltas."""
    for site in sites:
        wrapper = site.module if isinstance(site.module, StackedLinear) else StackedLinear(site.module, site)
        wrapper.source = source
        site.replace(wrapper)
