"""The store that is imported into, as it is before: its base and what it holds. Changes nothing."""

from dataclasses import dataclass
from pathlib import Path

from engine.model.base import BaseIdentity, identify_base
from server.errors import ReferenceRefused
from stack_store.manifest import DomainEntry, Manifest, read_manifest
from stack_store.registry import MANIFEST, StackRegistry


@dataclass(frozen=True, slots=True)
class Target:
    """Without a manifest the store is still to be made."""

    path: Path
    base: BaseIdentity
    manifest: Manifest | None

    @property
    def hidden_size(self) -> int:
        """What the q projection of every layer reads."""
        return self.base.geometry.shapes["q_proj"][0]

    def domain(self, name: str) -> DomainEntry | None:
        domains = () if self.manifest is None else self.manifest.domains
        return next((domain for domain in domains if domain.name == name), None)

    @property
    def router_digest(self) -> str | None:
        return None if self.manifest is None or self.manifest.router is None else self.manifest.router.digest

    def open_registry(self) -> StackRegistry:
        """The store, made now if it is missing."""
        identity = {"base_fingerprint": self.base.fingerprint, "geometry": self.base.geometry}
        make_or_open = StackRegistry.create if self.manifest is None else StackRegistry.open
        return make_or_open(self.path, **identity)  # type: ignore[arg-type]


def find_target(path: Path, base: str | None) -> Target:
    """The store at that path; its base is the store's own, or the one named, or for a new store the embedded one.

    Raises ReferenceRefused if both are there and differ, or if the folder holds something else; ManifestInvalid and
    BaseUnsupported as their readers do.
    """
    if (path / MANIFEST).is_file():
        return _existing(path, base)
    if path.exists() and not (path.is_dir() and StackRegistry.is_unborn(path)):
        raise ReferenceRefused(f"{str(path)!r} is neither a store nor an empty folder")
    return Target(path, identify_base(base), None)


def _existing(path: Path, base: str | None) -> Target:
    manifest = read_manifest(path / MANIFEST)
    model_id = manifest.base_fingerprint.rpartition("@")[0]
    own = BaseIdentity(model_id, manifest.base_fingerprint, manifest.geometry)
    if base is not None and (named := identify_base(base)) != own:
        raise ReferenceRefused(
            f"store {str(path)!r} is for base {own.fingerprint!r}, not for {named.fingerprint!r} ({base!r})"
        )
    return Target(path, own, manifest)


def require_model(model: str, target: Target, *, trained_on: str | None) -> None:
    """ReferenceRefused unless the base is the model that the manifest names, or is said to be by naming the same.

    A base in a local folder has the folder's name, so the last part of the name decides.
    """
    ours = target.base.model_id
    if trained_on not in (None, model):
        raise ReferenceRefused(f"the manifest's model is {model!r}, not {trained_on!r}")
    if trained_on is None and model.rpartition("/")[2] != ours.rpartition("/")[2]:
        raise ReferenceRefused(
            f"the manifest's model is {model!r}, the base is {ours!r}: if they are the same, say so by --trained-on"
        )
