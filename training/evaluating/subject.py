"""What is evaluated: a base, the domains of a store, and the router between them. Knows files, no losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.model.base import Base
from engine.model.hidden import hidden_states
from engine.model.moe_lora import ServingStack
from router.checkpoint import RouterCheckpoint
from router.policy import RoutingPolicy
from router.router import Router
from stack_store.registry import StackRegistry
from training.evaluating.finished import content_key
from training.freezing import load_frozen

DomainName = str
Mix = Mapping[DomainName, float]  # the active domains' weights


@dataclass(frozen=True, slots=True)
class Subject:
    """Loaded and ready to be measured. Every domain of the store takes part, also those that no recipe names."""

    base: Base
    stacks: Mapping[DomainName, tuple[ServingStack, ...]]
    digests: Mapping[DomainName, tuple[str, ...]]  # of the stacks, rounds in order
    router: Router | None
    router_digest: str | None
    policy: RoutingPolicy  # the router's own, or the recipe's if there is no router
    notes: tuple[str, ...]  # what a reader of the numbers must know of the store

    def key(self, kind: str, mix: Mix, *content: Any) -> bytes:
        """Names a measurement of this content under a mix by all that it depends on.

        That is the base and how it is held, and the weights with the digests that they weigh, whatever the domains are
        called.
        """
        base = [self.base.fingerprint, self.base.base_format, str(self.base.dtype)]
        weighed = sorted([weight, *self.digests[name]] for name, weight in mix.items() if weight)
        return content_key(kind, base, weighed, *content)


def open_subject(base: Base, store: Path, policy: RoutingPolicy) -> Subject:
    """Reads all domains and the active router of a store. `policy` stands in where there is no router."""
    registry = StackRegistry.open(store, base_fingerprint=base.fingerprint, geometry=base.geometry)
    try:
        entries = registry.manifest.domains
        stacks = {e.name: load_frozen(base, [registry.stack_path(stack) for stack in e.stacks]) for e in entries}
        digests = {e.name: tuple(stack.digest for stack in e.stacks) for e in entries}
        checkpoint = _read_router(registry, base)
    finally:
        registry.close()
    router = None if checkpoint is None else _live(checkpoint, base)
    return Subject(
        base=base,
        stacks=stacks,
        digests=digests,
        router=router,
        router_digest=registry.manifest.router.digest if registry.manifest.router else None,
        policy=policy if checkpoint is None else checkpoint.policy,
        notes=() if checkpoint is None else tuple(_notes(checkpoint, digests)),
    )


def _read_router(registry: StackRegistry, base: Base) -> RouterCheckpoint | None:
    entry, path = registry.manifest.router, registry.router_path()
    if entry is None or path is None:
        return None
    return RouterCheckpoint.load(path, base_fingerprint=base.fingerprint, expected_digest=entry.digest)


def _live(checkpoint: RouterCheckpoint, base: Base) -> Router:
    features = partial(hidden_states, base, mid_layer=checkpoint.settings.mid_layer)
    return Router.from_checkpoint(checkpoint, tokenizer=base.tokenizer, hidden_states=features)


def _notes(checkpoint: RouterCheckpoint, digests: Mapping[DomainName, tuple[str, ...]]) -> list[str]:
    """As the server sees these cases: a router of other stacks still routes, and a domain that is gone is left out."""
    known = checkpoint.network.domains
    stale = [name for name in known if name in digests and checkpoint.stack_digests[name] != digests[name]]
    gone = [name for name in known if name not in digests]
    unknown = [name for name in digests if name not in known]
    notes = []
    if stale:
        notes.append(f"the router was trained against other stacks of {stale} than the store's")
    if gone:
        notes.append(f"the router knows {gone}, which the store lacks: left out of every mix, as in serving")
    if unknown:
        notes.append(f"the router does not know {unknown}: they are never routed to")
    return notes
