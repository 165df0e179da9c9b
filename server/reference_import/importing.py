"""Imports a published store: checks and converts all of it beside the store, then changes the store once.

Knows the order of these steps, not the formats.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from router.checkpoint import RouterCheckpoint
from server.errors import ReferenceRefused
from server.reference_import.conversion import ConvertedStack, convert_stack
from server.reference_import.published_folder import PublishedFolder
from server.reference_import.published_router import read_published_router
from server.reference_import.published_store import PublishedStore, read_published_store
from server.reference_import.report import Converted, ImportReport
from server.reference_import.settings import RouterSettings, StackSettings
from server.reference_import.target import Target, find_target, require_model
from server.reference_import.work_folder import work_folder

OnProgress = Callable[[int, int], object]  # stacks converted, stacks in all


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What is to be imported, where to, and how. Without router settings the router is left out."""

    folder: Path
    store: Path
    base: str | None
    manifest: str
    trained_on: str | None
    stacks: StackSettings
    router: RouterSettings | None
    replace: bool
    dry_run: bool


def run_import(plan: ImportPlan, on_progress: OnProgress = lambda done, total: None) -> ImportReport:
    """Carries the plan out. Whatever is wrong with the published files is found before the store is changed or made.

    A store that exists is then changed once, from the old state to the new. Converted stacks lie beside the store until
    then. Raises ReferenceRefused, naming the thing and the value; EngineError and StoreError of base and store.
    """
    try:
        return _run(plan, on_progress)
    except OSError as error:
        raise ReferenceRefused(f"the import of {str(plan.folder)!r} stopped: {error}") from error


def _run(plan: ImportPlan, on_progress: OnProgress) -> ImportReport:
    if not plan.folder.is_dir():
        raise ReferenceRefused(f"{str(plan.folder)!r} is not a folder")
    folder = PublishedFolder(plan.folder)
    published = read_published_store(folder, plan.manifest)
    target = find_target(plan.store, plan.base)
    require_model(published.model, target, trained_on=plan.trained_on)
    router = _read_router(plan.router, folder, published, target)
    with work_folder(_nearest_folder(plan.store)) as temporary:
        stacks = _convert(plan, folder, published, target, temporary, on_progress)
        router_path = None
        if router is not None:
            digests = {name: tuple(stack.digest for stack in rounds) for name, rounds in stacks.items()}
            router, router_path = replace(router, stack_digests=digests), temporary / "router.safetensors"
            _require_free_router(plan, target, router.save(router_path))
        generation = None if plan.dry_run else _change(target, stacks, router_path)
    return ImportReport(target.base.fingerprint, stacks, router, generation)


def _read_router(
    settings: RouterSettings | None, folder: PublishedFolder, published: PublishedStore, target: Target
) -> RouterCheckpoint | None:
    """The published router, which lacks only the digests of the stacks that it goes with."""
    if settings is None:
        return None
    file = folder.find("the router", [settings.file])
    names = [domain.name for domain in published.domains]
    network, policy = read_published_router(
        file, folder.load(file).content, domains=names, hidden_size=target.hidden_size
    )
    return RouterCheckpoint(
        network=network,
        settings=settings.features(target.base.geometry.num_layers),
        policy=policy,
        stack_digests={},
        base_fingerprint=target.base.fingerprint,
    )


def _convert(
    plan: ImportPlan,
    folder: PublishedFolder,
    published: PublishedStore,
    target: Target,
    temporary: Path,
    on_progress: OnProgress,
) -> Converted:
    """Every stack as a file in the temporary folder."""
    stacks: dict[str, tuple[ConvertedStack, ...]] = {}
    owners: dict[str, str] = {}  # published digest -> whose it is
    num_done = 0
    for domain in published.domains:
        rounds = []
        for round, file in enumerate(domain.files, start=1):
            on_progress(num_done, published.num_stacks)
            path = temporary / f"{domain.name}-{round}.safetensors"
            how, base = plan.stacks, target.base
            stack = convert_stack(folder, file, path, domain=domain.name, round=round, base=base, how=how)
            owner = f"round {round} of domain {domain.name!r}"
            if (other := owners.setdefault(stack.published_digest, owner)) != owner:
                raise ReferenceRefused(f"{file} is a copy of {other}")  # what belongs there is missing
            rounds.append(stack)
            num_done += 1
        stacks[domain.name] = tuple(rounds)
        _require_free_domain(plan, target, domain.name, stacks[domain.name])
    on_progress(num_done, published.num_stacks)
    return stacks


def _require_free_domain(plan: ImportPlan, target: Target, name: str, rounds: tuple[ConvertedStack, ...]) -> None:
    """The same stacks once more are welcome: an import that was stopped may simply be run again."""
    entry = target.domain(name)
    if entry is None or plan.replace or [s.digest for s in entry.stacks] == [s.digest for s in rounds]:
        return
    raise ReferenceRefused(
        f"store {str(plan.store)!r} has a domain {name!r} with other stacks, version {entry.version} (--replace)"
    )


def _require_free_router(plan: ImportPlan, target: Target, digest: str) -> None:
    if plan.replace or target.router_digest in (None, digest):
        return
    raise ReferenceRefused(f"store {str(plan.store)!r} has another router, {target.router_digest} (--replace)")


def _change(target: Target, stacks: Converted, router: Path | None) -> int:
    """The one change of the store. GenerationConflict if somebody changed it since it was looked at."""
    expected = 0 if target.manifest is None else target.manifest.generation
    registry = target.open_registry()
    try:
        domains = {name: [stack.path for stack in rounds] for name, rounds in stacks.items()}
        return registry.import_domains(domains, router=router, expected_generation=expected).generation
    finally:
        registry.close()


def _nearest_folder(store: Path) -> Path:
    """The folder that the store lies in or will, or the first above it that exists."""
    return next(folder for folder in store.absolute().parents if folder.is_dir())
