"""Leasing a mix while the store changes under it."""

import asyncio
from pathlib import Path

import pytest
import torch

from engine.slots import ResidentDomain, load_domain
from server.catalog import Catalog, Versions
from stack_store.cache import ResidentCache
from stack_store.errors import DomainNotFound, LoadFailed
from stack_store.registry import StackRegistry
from tests.fakes import ManualExecutor, tiny_header, write_random_stack
from tests.servers import make_store

CPU = torch.device("cpu")


class Shop:
    """A catalog whose loads run when told to."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "import"
        self.registry: StackRegistry = make_store(folder / "store", self.sources)
        self.versions, self.executor = Versions(), ManualExecutor()
        self.cache = ResidentCache[ResidentDomain](budget_bytes=10**9, load=self._load, executor=self.executor)
        self.catalog = Catalog(self.registry, self.cache, self.versions, dtype=torch.float32, lease_timeout_seconds=60)

    def _load(self, key: str) -> ResidentDomain:
        return load_domain(self.registry, self.versions.entry(key), dtype=torch.float32, device=CPU)

    def remove(self, domain: str) -> None:
        """As if the files had gone too, which the server never does while a lease is wanted."""
        self.registry.unlink_version(self.registry.remove_domain(domain).entry)

    def replace(self, domain: str) -> None:
        old = self.registry.domain(domain)
        write_random_stack(self.sources / "new.safetensors", tiny_header(domain=domain), seed=99)
        self.registry.register_domain(domain, [self.sources / "new.safetensors"])
        self.registry.unlink_version(old)


async def run_loads(shop: Shop) -> None:
    """Lets waiting tasks ask for their leases, then loads."""
    for _ in range(5):
        await asyncio.sleep(0)
        shop.executor.run_all()


def test_routed_domain_that_is_deleted_while_it_loads_is_left_out(tmp_path: Path) -> None:
    async def lease_while_deleting() -> None:
        shop = Shop(tmp_path)
        lease = asyncio.create_task(shop.catalog.lease_mix({"chat": 0.2, "math": 0.9}, adaptable=True))
        await asyncio.sleep(0)
        shop.remove("math")
        await run_loads(shop)
        leased = await lease
        assert leased.weights == {"chat": 0.2}
        leased.release()
        shop.cache.check_integrity()

    asyncio.run(lease_while_deleting())


def test_demanded_domain_that_is_deleted_while_it_loads_is_an_error(tmp_path: Path) -> None:
    async def lease_while_deleting() -> None:
        shop = Shop(tmp_path)
        lease = asyncio.create_task(shop.catalog.lease_mix({"math": 0.9}, adaptable=False))
        await asyncio.sleep(0)
        shop.remove("math")
        await run_loads(shop)
        with pytest.raises(DomainNotFound, match="'math'"):
            await lease

    asyncio.run(lease_while_deleting())


def test_domain_that_is_replaced_while_it_loads_is_leased_in_its_new_version(tmp_path: Path) -> None:
    async def lease_while_replacing() -> None:
        shop = Shop(tmp_path)
        lease = asyncio.create_task(shop.catalog.lease_mix({"math": 0.9}, adaptable=False))
        await asyncio.sleep(0)
        shop.replace("math")
        await run_loads(shop)
        leased = await lease
        assert [domain.version for domain, _ in leased.domains] == [shop.registry.domain("math").version]

    asyncio.run(lease_while_replacing())


def test_file_that_cannot_be_loaded_is_not_tried_for_ever(tmp_path: Path) -> None:
    async def lease_damaged() -> None:
        shop = Shop(tmp_path)
        shop.registry.stack_path(shop.registry.domain("math").stacks[0]).unlink()
        lease = asyncio.create_task(shop.catalog.lease_mix({"math": 0.9}, adaptable=True))
        await run_loads(shop)
        with pytest.raises(LoadFailed):
            await lease

    asyncio.run(lease_damaged())


def test_mix_of_nothing_holds_nothing(tmp_path: Path) -> None:
    async def lease_nothing() -> None:
        shop = Shop(tmp_path)
        leased = await shop.catalog.lease_mix({}, adaptable=True)
        assert (leased.domains, leased.lease) == ((), None)
        leased.release()

    asyncio.run(lease_nothing())
