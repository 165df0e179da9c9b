"""Sorts numbers by layer and by projection. Knows the names `layer.projection`, not what the numbers mean."""

from collections.abc import Mapping
from typing import TypeVar

from stack_store.header import PROJECTIONS

Value = TypeVar("Value")


def place_of(name: str) -> tuple[int, str]:
    """Layer and projection of a name. Raises ValueError, naming it, if it is not `layer.projection`."""
    layer, _, projection = name.partition(".")
    if not (layer.isascii() and layer.isdigit()) or projection not in PROJECTIONS:
        raise ValueError(f"{name!r} is not layer.projection, with one of {', '.join(PROJECTIONS)}")
    return int(layer), projection


def by_layer(values: Mapping[str, Value]) -> dict[int, list[Value]]:
    """The values of each layer's projections; layers in order."""
    layers: dict[int, list[Value]] = {}
    for name in sorted(values, key=place_of):
        layers.setdefault(place_of(name)[0], []).append(values[name])
    return layers


def by_projection(values: Mapping[str, Value]) -> dict[str, list[Value]]:
    """The values of each projection's layers; all projections, in the order of PROJECTIONS."""
    kinds: dict[str, list[Value]] = {projection: [] for projection in PROJECTIONS}
    for name, value in values.items():
        kinds[place_of(name)[1]].append(value)
    return kinds
