"""Decides what a request asks of the domains. Knows model names and weights; not bytes, not what is resident.

A model name may fix the mix: `<name>:base` is the base alone, `<name>:<domain>` that domain at weight 1.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.errors import InvalidRequest, ModelNotFound
from server.schemas import MixRequest

BASE_SUFFIX = "base"


@dataclass(frozen=True, slots=True)
class MixChoice:
    """Who decides the mix: the router, or the request with its own weights."""

    kind: Literal["auto", "base", "all", "explicit"]
    weights: Mapping[str, float] = field(default_factory=dict)
    expected: tuple[str, ...] = ()  # domains that the client expects of the router


def choose_mix(
    *, model: str | None, extension: MixRequest | None, served_name: str, domains: Container[str]
) -> MixChoice:
    """What model name and extension ask for together. ModelNotFound or InvalidRequest if they make no sense."""
    suffix = _suffix(model, served_name)
    if suffix is None:
        return _from_extension(extension)
    if suffix != BASE_SUFFIX and suffix not in domains:
        raise ModelNotFound(f"the model {model!r} does not exist: no domain {suffix!r}", param="model")
    if extension is not None and extension != MixRequest():
        raise InvalidRequest(f"the model {model!r} fixes the mix, so brainstacks must not be set", param="brainstacks")
    return MixChoice("base") if suffix == BASE_SUFFIX else MixChoice("explicit", {suffix: 1.0})


def model_names(served_name: str, domains: Sequence[str]) -> list[str]:
    """Every model that a client may ask for."""
    return [served_name, f"{served_name}:{BASE_SUFFIX}", *(f"{served_name}:{domain}" for domain in domains)]


def show_mix(mix: Mapping[str, float]) -> str:
    """`chat=0.20,math=0.93` for a header or a log line; `base` for the base alone."""
    return ",".join(f"{name}={mix[name]:.2f}" for name in sorted(mix)) or BASE_SUFFIX


def _suffix(model: str | None, served_name: str) -> str | None:
    if model is None or model == served_name:
        return None
    name, colon, suffix = model.rpartition(":")
    if not colon or name != served_name:
        raise ModelNotFound(f"the model {model!r} does not exist; this server serves {served_name!r}", param="model")
    return suffix


def _from_extension(extension: MixRequest | None) -> MixChoice:
    if extension is None:
        return MixChoice("auto")
    if extension.mix is not None:
        return MixChoice("explicit", extension.mix)
    return MixChoice(extension.mode or "auto", expected=tuple(extension.expect or ()))
