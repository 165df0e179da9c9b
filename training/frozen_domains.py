"""Holds what a run has frozen so far: the domains' stacks, what each claims, what is protected. Trains nothing."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from engine.model.base import Base
from stack_store.registry import StackRegistry
from training.context import Rounds, pack_of
from training.data.examples import Example
from training.freezing import load_frozen, stored_b
from training.journal import Journal
from training.protected_space import ProtectedSpace, extend, name_of
from training.recipe import Recipe
from training.reports import SubspaceReport, read_report_of, report_path, write_report
from training.subspaces import Directions, DomainSubspace, add_domain, empty_report
from training.survey import claimed_directions, mean_deltas
from training.workers import Workers

logger = logging.getLogger(__name__)


class FrozenDomains:
    """What later domains train beside and around, in the curriculum's order."""

    def __init__(self, recipe: Recipe, base: Base, store: Path, workers: Workers) -> None:
        self._recipe, self._base, self._store, self._workers = recipe, base, store, workers
        self._directions: dict[str, Directions] = {}
        self.stacks: dict[str, Rounds] = {}
        self.protected = ProtectedSpace.empty(base.geometry)

    def take_in(self, domain: str, journal: Journal, held_out: Sequence[Example], *, is_new: bool) -> None:
        """Counts a registered domain among the frozen, and what it claims among the protected.

        The first worker finds the directions and writes them; all read them, for each device would find its own.
        """
        self.stacks[domain] = load_frozen(self._base, self._paths(domain))
        # A store that was copied without its journals has a finished domain without directions.
        if self._workers.is_first and (is_new or journal.load_directions(self._base.geometry) is None):
            self._survey(domain, journal, held_out)
        self._workers.wait()
        kept = journal.load_directions(self._base.geometry)
        assert kept is not None
        own, self.protected = kept
        self._directions[domain] = own.bases

    def _survey(self, domain: str, journal: Journal, held_out: Sequence[Example]) -> None:
        """Finds where a domain's deltas lie, writes the directions down and reports them."""
        section = self._recipe.settings.null_space
        pack = pack_of([domain], self.stacks)
        assert pack is not None
        max_tokens = self._recipe.settings.training.max_pass_tokens
        rows = mean_deltas(self._base, pack, held_out[: section.samples], max_tokens=max_tokens)
        directions, values = claimed_directions(rows, count=section.directions, seed=self._recipe.settings.seed)
        after = extend(self.protected, directions, max_share=section.max_share)
        self._warn_of_cap(domain, directions, after)
        subspace = DomainSubspace(
            rows={key: row.cpu() for key, row in rows.items()},
            directions=directions,
            singular_values=values,
            folded_b=stored_b(self._paths(domain)),
            before=self.protected,
            after=after,
        )
        path = report_path(self._store, "subspaces")
        known = read_report_of(path, SubspaceReport, self._directions) or empty_report()
        write_report(path, add_domain(known, domain, subspace, self._directions))
        journal.save_directions(own=ProtectedSpace(directions), after=after)

    def _warn_of_cap(self, domain: str, found: Directions, after: ProtectedSpace) -> None:
        """Says so if a domain is protected less than it could be, because others came first."""
        before, max_share = self.protected.bases, self._recipe.settings.null_space.max_share
        cut = [
            key
            for key, basis in after.bases.items()
            if (basis.shape[1] + 1) / basis.shape[0] > max_share
            and basis.shape[1] < before[key].shape[1] + found[key].shape[1]
        ]
        if cut:
            logger.warning(
                "no room for all directions of a domain name=%s projections=%d of=%d first=%s max_share=%s",
                domain,
                len(cut),
                len(found),
                name_of(cut[0]),
                max_share,
            )

    def _paths(self, domain: str) -> list[Path]:
        with closing(StackRegistry.open(self._store)) as registry:
            return [registry.stack_path(stack) for stack in registry.domain(domain).stacks]
