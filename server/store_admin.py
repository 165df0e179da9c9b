"""Changes and shows the store while requests run. Knows registry, cache, sources and the live router; no HTTP.

Longer than most files because a change takes the same care in every step: files, manifest, memory, then the old files.

Lives on the event loop; whatever touches files runs in a thread. A version that is replaced or deleted leaves the
manifest first, then device memory when its last lease ends, then the disk.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.slots import ResidentDomain
from router.errors import RouterError
from server.admin_schemas import FileSource, Tier
from server.catalog import Catalog
from server.downloads import Downloads
from server.errors import InvalidRequest
from server.live_router import knowledge_of, stale_domains, warn_of_stale_domains
from server.ports import RouterPort
from server.routing import Routing
from server.sources import Sources
from stack_store.cache import ResidentCache
from stack_store.errors import LoadFailed, MixTooLarge
from stack_store.integrity import IntegrityCheck
from stack_store.manifest import DomainEntry
from stack_store.registry import Registration

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class StoreAdmin:
    """What the admin routes call."""

    def __init__(
        self,
        catalog: Catalog,
        routing: Routing,
        sources: Sources,
        downloads: Downloads,
        integrity: IntegrityCheck,
        *,
        budget_bytes: int,
    ) -> None:
        self.sources = sources
        self._integrity = integrity
        self._downloads = downloads
        self._catalog = catalog
        self._registry = catalog.registry
        self._cache = catalog.cache
        self._routing = routing
        self._budget_bytes = budget_bytes
        self._retirements: set[asyncio.Task[int]] = set()
        self._held = dict(self._registry.by_name)  # what memory was told of, as this process left it
        self._held_router = self._registry.manifest.router
        self._changing = asyncio.Lock()  # a change in memory follows its manifest before the next manifest is written

    @property
    def generation(self) -> int:
        """The manifest's generation, which `If-Match` compares."""
        return self._registry.manifest.generation

    async def follow(self) -> None:
        """What another process made of the store holds here too: its domains, their versions, its router.

        A change that is being made here is not waited for; the next call sees what both made.
        """
        if self._changing.locked():
            return
        async with self._changing:
            await asyncio.to_thread(self._registry.look_again)
            if self._registry.by_name != self._held:
                await asyncio.to_thread(self._catalog.read_headers)
                self._follow_domains()
            await self._follow_router()

    def _follow_domains(self) -> None:
        current = self._registry.by_name
        logger.info("store changed by another process generation=%d domains=%s", self.generation, list(current))
        for name, previous in self._held.items():
            if name not in current:
                self._finish_retirement(previous, self._catalog.retire(previous))
            elif current[name] != previous:
                self._replace(previous, current[name])
        self._held = dict(current)
        warn_of_stale_domains(self._routing.router, list(current.values()))

    async def _follow_router(self) -> None:
        entry, path = self._registry.manifest.router, self._registry.router_path()
        if entry == self._held_router or path is None:
            return
        self._held_router = entry
        try:
            self._routing.swap(await asyncio.to_thread(self._load_router, path))
        except (RouterError, OSError) as error:
            logger.error("router of another process is not taken, the old one stays live reason=%r", str(error))

    def list_domains(self) -> Json:
        """Every registered domain with what is resident of it."""
        manifest = self._registry.manifest
        return {
            "generation": manifest.generation,
            "base_fingerprint": manifest.base_fingerprint,
            "domains": [self._shown(entry) for entry in manifest.domains],
            "router": self._shown_router(),
        }

    def show_domain(self, name: str) -> Json:
        """One domain. DomainNotFound."""
        return self._shown(self._registry.domain(name)) | {"generation": self.generation}

    def show_cache(self) -> Json:
        """The device tier: budget, bytes, and every entry; under `host` the same of the host tier, if there is one."""
        host = self._catalog.host
        return asdict(self._cache.snapshot()) | {"host": None if host is None else asdict(host.snapshot())}

    async def register(
        self, name: str, sources: Sequence[FileSource], *, dry_run: bool, expected_generation: int | None
    ) -> tuple[Json, bool]:
        """Verifies, copies and switches: what is registered now, and whether it is new. Refusals change nothing."""
        await self._downloads.fetch(sources)  # before the lock, so that other changes need not wait for it
        async with self._changing:
            registration = await asyncio.to_thread(
                self._register, name, sources, dry_run=dry_run, expected_generation=expected_generation
            )
            entry, previous = registration.entry, registration.previous
            if registration.changed and not dry_run:
                logger.info("domain registered name=%s version=%s", name, entry.version)
                if previous is not None:
                    self._replace(previous, entry)
                self._held[name] = entry
                warn_of_stale_domains(self._routing.router, [entry])
        shown = _described(entry) if dry_run else self._shown(entry)
        shown |= {"generation": registration.generation, "changed": registration.changed, "dry_run": dry_run}
        return shown, previous is None

    async def remove(self, name: str, *, expected_generation: int | None) -> Json:
        """Deletes a domain. Requests that hold it finish; `draining` until the last of them has."""
        async with self._changing:
            removal = await asyncio.to_thread(
                self._registry.remove_domain, name, expected_generation=expected_generation
            )
            self._held.pop(name, None)
            logger.info("domain removed name=%s version=%s", name, removal.entry.version)
            retired = self._catalog.retire(removal.entry)
            finishing = self._finish_retirement(removal.entry, retired)
        answer: Json = {"name": name, "generation": removal.generation}
        if not retired.done():
            return answer | {"status": "draining", "freed_bytes": 0}
        return answer | {"status": "deleted", "freed_bytes": await asyncio.shield(finishing)}

    async def pin(self, name: str, tier: Tier) -> Json:
        """Loads a domain into a tier and keeps it there."""
        want = self._catalog.want(self._registry.domain(name))
        await asyncio.wrap_future(self._tier(tier).pin(want.key, want.bytes))
        return self.show_domain(name)

    def unpin(self, name: str, tier: Tier) -> Json:
        """Lets a domain be evicted from a tier again."""
        self._tier(tier).unpin(self._catalog.want(self._registry.domain(name)).key)
        return self.show_domain(name)

    def prefetch(self, name: str, tier: Tier) -> Json:
        """Starts to load a domain into a tier without holding it."""
        self._tier(tier).prefetch([self._catalog.want(self._registry.domain(name))])
        return self.show_domain(name)

    async def verify(self, name: str) -> Json:
        """Reads all bytes of a domain's files again: of each its digest, and its fault if it has one."""
        entry = self._registry.domain(name)
        checks = await asyncio.to_thread(self._integrity.check_domain, entry)
        return {"name": name, "version": entry.version, "files": [asdict(check) for check in checks]}

    def start(self) -> None:
        """Begins what runs in the background."""
        self._integrity.start()

    async def set_router(self, source: FileSource, *, expected_generation: int | None) -> Json:
        """Checks a router file, makes it the store's router and the live one. Refusals change nothing."""
        await self._downloads.fetch([source])
        async with self._changing:
            router = await asyncio.to_thread(self._install_router, source, expected_generation)
            self._held_router = self._registry.manifest.router
            self._routing.swap(router)
        warn_of_stale_domains(router, self._registry.manifest.domains)
        return {"generation": self.generation, "router": self._shown_router()}

    async def close(self) -> None:
        """Waits for nothing: what is still leased when the server ends is tidied at its next start."""
        self._downloads.close()
        await asyncio.to_thread(self._integrity.close)
        for retirement in self._retirements:
            retirement.cancel()
        await asyncio.gather(*self._retirements, return_exceptions=True)

    def _install_router(self, source: FileSource, expected_generation: int | None) -> RouterPort:
        with self.sources.router_file(source) as path:
            router = self._load_router(path)
            self._registry.set_router(path, expected_generation=expected_generation)
        self.sources.forget(source)
        return router

    def _load_router(self, path: Path) -> RouterPort:
        try:
            return self._routing.load(path)
        except RouterError as error:  # a client need not know where the file lies
            message = str(error).replace(f"router file {path}", "the router file").replace(str(path), "the router file")
            raise type(error)(message) from error

    def _register(
        self, name: str, sources: Sequence[FileSource], *, dry_run: bool, expected_generation: int | None
    ) -> Registration:
        with ExitStack() as opened:
            registration = self._registry.register_domain(
                name,
                [self.sources.open(source, opened) for source in sources],
                expected_generation=expected_generation,
                dry_run=dry_run,
                max_resident_bytes=self._budget_bytes,
                dtype=self._catalog.dtype,
            )
        if not dry_run:
            for source in sources:
                self.sources.forget(source)
            self._catalog.want(registration.entry)  # reads the headers here, not on the event loop
        return registration

    def _replace(self, previous: DomainEntry, entry: DomainEntry) -> None:
        """The old version goes when its last lease ends; the new one is pinned if the old one was and if it fits."""
        old_key = self._catalog.versions.key(previous)
        tiers = [self._cache] if self._catalog.host is None else [self._cache, self._catalog.host]
        pinned_in = [tier for tier in tiers if (old := tier.entry(old_key)) is not None and old.pinned]
        self._finish_retirement(previous, self._catalog.retire(previous))
        for tier in pinned_in:
            try:
                want = self._catalog.want(entry)
                tier.pin(want.key, want.bytes)
            except (LoadFailed, MixTooLarge) as error:
                logger.warning("replaced domain is not pinned any more name=%s reason=%r", entry.name, str(error))

    def _finish_retirement(self, entry: DomainEntry, retired: Future[int]) -> asyncio.Task[int]:
        """In the background, kept from being collected while it waits for the last lease."""
        task = asyncio.create_task(self._unlink_when_retired(entry, retired))
        self._retirements.add(task)
        task.add_done_callback(self._retirements.discard)
        return task

    async def _unlink_when_retired(self, entry: DomainEntry, retired: Future[int]) -> int:
        freed_bytes = await asyncio.wrap_future(retired)
        disk_bytes = await asyncio.to_thread(self._registry.unlink_version, entry)
        if entry not in self._registry.manifest.domains:
            self._catalog.versions.forget(self._catalog.versions.key(entry))
        logger.info(
            "version retired name=%s version=%s freed_bytes=%d disk_bytes=%d",
            entry.name,
            entry.version,
            freed_bytes,
            disk_bytes,
        )
        return freed_bytes

    def _tier(self, tier: Tier) -> ResidentCache[ResidentDomain]:
        if tier == "device":
            return self._cache
        if self._catalog.host is None:
            raise InvalidRequest(
                "tier: this server has no host tier; one is kept where the device is CUDA", param="tier"
            )
        return self._catalog.host

    def _shown(self, entry: DomainEntry) -> Json:
        """`state` is absent, loading, resident, or damaged: then its files are not what was registered.

        `router` is what the live router knows of it: an unknown domain is served when a request names it.
        """
        shown = _described(entry) | {"router": knowledge_of(self._routing.router, entry)}
        try:
            want = self._catalog.want(entry)
        except LoadFailed as error:
            damaged = {"state": "damaged", "error": str(error)}
            return shown | damaged | {"resident_bytes": None, "leases": 0, "pinned": False}
        cached = self._cache.entry(want.key)
        shown |= {
            "state": "absent" if cached is None else cached.state,
            "resident_bytes": want.bytes,
            "leases": 0 if cached is None else cached.leases,
            "pinned": cached is not None and cached.pinned,
        }
        if faults := self._integrity.faults_of(entry):
            shown |= {"damaged_files": [asdict(fault) for fault in faults]}
        return shown

    def _shown_router(self) -> Json | None:
        """How the router fits the store.

        `stale` names the domains whose stacks are others than it was trained against, `missing` those that it knows and
        the store has not, `unknown` those that the store has and it does not know.
        """
        manifest, live = self._registry.manifest, self._routing.router
        if manifest.router is None:
            return None
        trained = {} if live is None else live.stack_digests
        return asdict(manifest.router) | {
            "stale": [] if live is None else stale_domains(live, manifest.domains),
            "missing": sorted(trained.keys() - self._registry.by_name.keys()),
            "unknown": [entry.name for entry in manifest.domains if entry.name not in trained],
        }


def _described(entry: DomainEntry) -> Json:
    """What a version is, wherever it is."""
    return {
        "name": entry.name,
        "version": entry.version,
        "stacks": [asdict(stack) for stack in entry.stacks],
        "bytes": sum(stack.bytes for stack in entry.stacks),
    }
