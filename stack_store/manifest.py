"""manifest.json: which domains a store has, in which version. Knows names and digests, not the files they name.

Reading is strict: a key that is missing or unknown, or a value that does not fit, is an error that names it.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stack_store.atomic import replace_file
from stack_store.errors import DomainNameInvalid, ManifestInvalid
from stack_store.header import Geometry, geometry_from_json

FORMAT_VERSION = 1
DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RESERVED_NAMES = ("all", "auto", "base")  # each means a mix of its own in a request
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StackEntry:
    """One round of a domain."""

    digest: str
    file: str  # relative to the store
    bytes: int
    round: int


@dataclass(frozen=True, slots=True)
class DomainEntry:
    """A domain at one version: its rounds in order."""

    name: str
    stacks: tuple[StackEntry, ...]

    @property
    def version(self) -> str:
        """The same for the same stacks in the same order, on every machine."""
        return hashlib.sha256("".join(stack.digest for stack in self.stacks).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RouterEntry:
    """The active router."""

    digest: str
    file: str  # relative to the store
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A store at one instant. The generation counts the changes since it was created."""

    format_version: int
    base_fingerprint: str
    geometry: Geometry
    domains: tuple[DomainEntry, ...]
    router: RouterEntry | None
    generation: int


def require_domain_name(name: str) -> None:
    if not DOMAIN_NAME.fullmatch(name):
        raise DomainNameInvalid(f"domain name {name!r} does not match {DOMAIN_NAME.pattern}")
    if name in RESERVED_NAMES:
        raise DomainNameInvalid(f"domain name {name!r} is reserved")


def stack_file(domain: str, round: int, digest: str) -> str:
    return f"domains/{domain}/{round}-{digest[:12]}.safetensors"


def router_file(digest: str) -> str:
    return f"routers/{digest[:12]}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """Raises ManifestInvalid, naming the fault, or FileNotFoundError."""
    try:
        return _manifest(json.loads(path.read_bytes()))
    except (ValueError, RecursionError, DomainNameInvalid) as error:
        raise ManifestInvalid(f"{path}: {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replaces the file atomically and durably."""
    with replace_file(path) as file:
        file.write(json.dumps(asdict(manifest), indent=2).encode() + b"\n")


def _manifest(value: Any) -> Manifest:
    # Asked first, because a later version may well have other keys.
    if isinstance(value, dict) and value.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(f"format_version is {value['format_version']!r}, this build knows {FORMAT_VERSION}")
    _require_keys("the manifest", value, Manifest.__slots__)
    _require("the manifest", value, "base_fingerprint", bool(value["base_fingerprint"]), str)
    _require("the manifest", value, "generation", True, int)
    _require("the manifest", value, "domains", True, list)
    domains = tuple(_domain(entry) for entry in value["domains"])
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise ValueError(f"a domain appears twice in {names}")
    return Manifest(
        format_version=FORMAT_VERSION,
        base_fingerprint=value["base_fingerprint"],
        geometry=geometry_from_json(value["geometry"]),
        domains=domains,
        router=None if value["router"] is None else _router(value["router"]),
        generation=value["generation"],
    )


def _domain(value: Any) -> DomainEntry:
    _require_keys("a domain", value, DomainEntry.__slots__)
    _require("a domain", value, "name", True, str)
    _require("a domain", value, "stacks", bool(value["stacks"]), list)
    require_domain_name(value["name"])
    stacks = enumerate(value["stacks"], start=1)
    return DomainEntry(value["name"], tuple(_stack(value["name"], round, stack) for round, stack in stacks))


def _stack(domain: str, round: int, value: Any) -> StackEntry:
    where = f"round {round} of domain {domain!r}"
    _require_keys(where, value, StackEntry.__slots__)
    _require_file(where, value)
    _require(where, value, "round", value["round"] == round, int)
    # The name follows from the rest, so that nobody can point a store at a file outside it.
    _require(where, value, "file", value["file"] == stack_file(domain, round, value["digest"]), str)
    return StackEntry(**value)


def _router(value: Any) -> RouterEntry:
    _require_keys("the router", value, RouterEntry.__slots__)
    _require_file("the router", value)
    _require("the router", value, "file", value["file"] == router_file(value["digest"]), str)
    return RouterEntry(**value)


def _require_file(where: str, value: Any) -> None:
    _require(where, value, "digest", bool(DIGEST.fullmatch(str(value["digest"]))), str)
    _require(where, value, "bytes", value["bytes"] != 0, int)


def _require_keys(where: str, value: Any, keys: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, must be an object")
    for problem, names in (("lacks", set(keys) - set(value)), ("has the unknown", set(value) - set(keys))):
        if names:
            raise ValueError(f"{where} {problem} {', '.join(sorted(names))}")


def _require(where: str, value: Any, key: str, fits: bool, kind: type) -> None:
    # `type`, because True is an int too.
    if not fits or type(value[key]) is not kind or (kind is int and value[key] < 0):
        raise ValueError(f"{where} has the {key} {value[key]!r}")
