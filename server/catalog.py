"""Leases the domains of a mix, each at its current version. Knows registry and cache; not routes, not tokens.

Lives on the event loop. A domain may be replaced or deleted at any await; every step looks at the manifest again.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from engine.slots import ResidentDomain
from server.mixes import MixChoice
from stack_store.cache import Lease, ResidentCache, Want, release_when_granted
from stack_store.errors import DomainNotFound, LeaseTimedOut, LoadFailed, MixTooLarge, StoreError
from stack_store.manifest import DomainEntry
from stack_store.registry import StackRegistry

logger = logging.getLogger(__name__)


class Versions:
    """Which version of a domain each cache key stands for. Read by the loader threads."""

    def __init__(self) -> None:
        self._entries: dict[str, DomainEntry] = {}

    def key(self, entry: DomainEntry) -> str:
        """The cache key of a version; from now on `entry` finds it."""
        key = f"{entry.name}@{entry.version}"
        self._entries[key] = entry
        return key

    def entry(self, key: str) -> DomainEntry:
        """KeyError for a key that was never given out, or forgotten."""
        return self._entries[key]

    def forget(self, key: str) -> None:
        """The version is neither registered nor resident any more."""
        self._entries.pop(key, None)


@dataclass(frozen=True, slots=True)
class LeasedMix:
    """The domains that answer one prompt, held until `release`. Empty: the base alone."""

    domains: tuple[tuple[ResidentDomain, float], ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    cold: tuple[str, ...] = ()
    dropped: Mapping[str, float] = field(default_factory=dict)
    lease: Lease[ResidentDomain] | None = None

    def release(self) -> "LeasedMix":
        """What can still be told once the hold has ended; this one would keep evicted tensors alive. Idempotent."""
        if self.lease is not None:
            self.lease.release()
        return replace(self, domains=(), lease=None)


class Catalog:
    """The registered domains, and the way to hold them."""

    def __init__(
        self,
        registry: StackRegistry,
        cache: ResidentCache[ResidentDomain],
        versions: Versions,
        *,
        dtype: torch.dtype,
        lease_timeout_seconds: float,
        host: ResidentCache[ResidentDomain] | None = None,
    ) -> None:
        """`cache` holds domains on the device, `host` in the pinned memory that they are copied from."""
        self._lease_timeout_seconds = lease_timeout_seconds
        self.registry = registry
        self.cache = cache
        self.host = host
        self.versions = versions
        self.dtype = dtype

    def names(self) -> list[str]:
        """Registered domains in the order of the manifest."""
        return list(self.registry.by_name)

    def want(self, entry: DomainEntry) -> Want:
        """What the cache is asked for. Reads stack headers at the first time; LoadFailed if they cannot be read."""
        try:
            num_bytes = self.registry.resident_bytes(entry, self.dtype)
        except (StoreError, OSError) as error:
            logger.error("domain damaged name=%s version=%s error=%s", entry.name, entry.version, error)
            raise LoadFailed(f"domain {entry.name!r} cannot be read") from error
        return Want(self.versions.key(entry), num_bytes)

    def retire(self, entry: DomainEntry) -> Future[int]:
        """Lets go of a deleted or replaced version, on the device when its last lease ends, then on the host.

        The future gives the bytes that the device had of it.
        """
        key = self.versions.key(entry)
        device = self.cache.retire(key)
        return device if self.host is None else _then(device, partial(self.host.retire, key))

    def close(self) -> None:
        """Ends all tiers. Idempotent."""
        self.cache.close()
        if self.host is not None:
            self.host.close()

    def read_headers(self) -> None:
        """Reads what later calls need to know of the domains. One that is damaged is logged: the others still serve."""
        for entry in self.registry.manifest.domains:
            with suppress(LoadFailed):
                self.want(entry)

    def largest_bytes(self) -> int:
        """What the largest registered domain takes when it is resident, damaged ones aside; 0 without any."""
        num_bytes = [0]
        for entry in self.registry.manifest.domains:
            with suppress(LoadFailed):
                num_bytes.append(self.want(entry).bytes)
        return max(num_bytes)

    def weights_of(self, choice: MixChoice, routed: Mapping[str, float]) -> dict[str, float]:
        """The weights to lease. DomainNotFound for an unknown domain that a request named itself.

        A router may know domains that are not registered here; these are left out.
        """
        known = self.registry.by_name
        for name in choice.expected:
            if name not in known:
                raise DomainNotFound(
                    f"the request expects {name!r}, which is not a domain of this store: {sorted(known)}"
                )
        if choice.kind == "auto":
            return {name: weight for name, weight in routed.items() if name in known}
        if choice.kind == "all":
            return dict.fromkeys(known, 1.0)
        for name in choice.weights:
            if name not in known:
                raise DomainNotFound(f"the mix names {name!r}, which is not a domain of this store: {sorted(known)}")
        return {name: weight for name, weight in choice.weights.items() if weight > 0}

    @contextmanager
    def loading(self, names: Iterable[str]) -> Iterator[None]:
        """Begins to load registered domains that are likely to be leased next, and keeps them until the block ends.

        What cannot be loaded is left to the lease, which says so.
        """
        registered = self.registry.by_name
        futures: list[Future[Lease[ResidentDomain]]] = []
        try:
            for name in dict.fromkeys(names):
                if name in registered:
                    with suppress(LoadFailed, MixTooLarge):
                        futures.append(self.cache.lease([self.want(registered[name])]))
            yield
        finally:
            for future in futures:
                release_when_granted(future)

    async def lease_mix(self, weights: Mapping[str, float], *, adaptable: bool) -> LeasedMix:
        """Waits until every domain is resident. Cancelling gives everything back.

        An adaptable mix, one that the router made, loses its lowest weights until it fits and any domain that was
        deleted meanwhile. Otherwise MixTooLarge and DomainNotFound are raised. LoadFailed and LeaseTimedOut in both
        cases; a load that took too long goes on, for whoever asks next.
        """
        active, dropped = dict(weights), dict[str, float]()
        while True:
            entries = self._entries(active, adaptable=adaptable)
            if not entries:
                return LeasedMix(dropped=dropped)
            try:
                wants = [self.want(entry) for entry in entries]
                lease = await claim_lease(self.cache.lease(wants), timeout_seconds=self._lease_timeout_seconds)
            except TimeoutError:
                seconds = self._lease_timeout_seconds
                raise LeaseTimedOut(f"the mix {sorted(active)} was not resident within {seconds:g} seconds") from None
            except MixTooLarge:
                if not adaptable:
                    raise
                lowest = min((entry.name for entry in entries), key=lambda name: active[name])
                dropped[lowest] = active.pop(lowest)
                logger.warning("domain dropped from mix domain=%s weight=%.3f reason=budget", lowest, dropped[lowest])
                continue
            except LoadFailed:
                if all(self._is_current(entry) for entry in entries):
                    raise
                continue  # it was replaced or deleted while it was loading
            mix = tuple((value, active[entry.name]) for entry, value in zip(entries, lease.values, strict=True))
            cold = tuple(e.name for e, want in zip(entries, wants, strict=True) if want.key in lease.cold)
            return LeasedMix(mix, {domain.name: weight for domain, weight in mix}, cold, dropped, lease)

    def _entries(self, weights: Mapping[str, float], *, adaptable: bool) -> list[DomainEntry]:
        registered = self.registry.by_name
        missing = [name for name in weights if name not in registered]
        if missing and not adaptable:
            raise DomainNotFound(f"domain {missing[0]!r} was deleted before its lease was granted")
        return [registered[name] for name in weights if name in registered]

    def _is_current(self, entry: DomainEntry) -> bool:
        return self.registry.by_name.get(entry.name) == entry


def _then(first: Future[int], begin_second: Callable[[], Future[int]]) -> Future[int]:
    """The result of the first, once the second, which begins behind it, is done too. Neither of them fails."""
    both: Future[int] = Future()
    both.set_running_or_notify_cancel()

    def go_on(first: Future[int]) -> None:
        begin_second().add_done_callback(lambda second: both.set_result(first.result()))

    first.add_done_callback(go_on)
    return both


async def claim_lease(future: Future[Lease[ResidentDomain]], *, timeout_seconds: float) -> Lease[ResidentDomain]:
    """Waits for a lease; one that is granted to a caller who has gone is released at once. Raises TimeoutError."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.wrap_future(future)
    except (asyncio.CancelledError, TimeoutError):
        release_when_granted(future)
        raise
