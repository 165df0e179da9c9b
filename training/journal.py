"""Keeps what a run has finished of one domain, so that a run that was killed goes on behind it. Knows files only.

The folder `training/<domain>-<digest>` of the store: each round's report and stack, and after the domain the directions
that it claims. A round's report is written after its stack: where there is a report, the round is whole.
"""

from collections.abc import Mapping
from pathlib import Path

from stack_store.atomic import TEMPORARY_SUFFIX, replace_file
from stack_store.format import Geometry
from training.errors import DataUnusable
from training.protected_space import ProtectedSpace
from training.reports import RoundReport, read_report, write_report

JOURNAL_FOLDER = "training"
ExpertShares = Mapping[str, tuple[float, ...]]  # layer.projection -> E shares


class Journal:
    """What is finished of one domain as one recipe has it."""

    def __init__(self, store: Path, *, domain: str, digest: str) -> None:
        self.folder = store / JOURNAL_FOLDER / f"{domain}-{digest[:12]}"

    def require_records(self, digest: str) -> None:
        """Notes which records the domain's training began with. Raises DataUnusable if they were others.

        A file is known by its bytes before it is read; a dataset of the hub may change under its name.
        """
        path = self.folder / "records.sha256"
        if path.exists():
            if path.read_text().strip() != digest:
                raise DataUnusable(
                    f"the records are others than when {self.folder} was begun; give the dataset a revision, or remove "
                    "that folder to train anew"
                )
            return
        self.make_folder()
        with replace_file(path) as file:
            file.write(f"{digest}\n".encode())

    def stack_path(self, round: int) -> Path:
        """Where a round's stack lies until the domain is registered."""
        return self.folder / f"round-{round}.safetensors"

    def rounds(self, *, with_stacks: bool) -> tuple[RoundReport, ...]:
        """The rounds that are finished, in order; `with_stacks` up to the first whose stack is gone."""
        reports: list[RoundReport] = []
        while (report := read_report(self._round_path(len(reports) + 1), RoundReport)) is not None:
            if with_stacks and report.kept and not self.stack_path(report.round).exists():
                break
            reports.append(report)
        return tuple(reports)

    def make_folder(self) -> None:
        """Before the first file is written."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish_round(self, report: RoundReport, experts: ExpertShares) -> None:
        """From now on this round is finished; its stack, if it is kept, was written before."""
        write_report(self._experts_path(report.round), experts)
        write_report(self._round_path(report.round), report)

    def experts(self, round: int) -> ExpertShares:
        """Each projection's shares of the expert assignments in a finished round."""
        shares = read_report(self._experts_path(round), dict[str, tuple[float, ...]])
        assert shares is not None
        return shares

    def tidy(self) -> None:
        """Removes the stacks, which the store has now, and files that a kill left half written."""
        for path in (*self.folder.glob("round-*.safetensors"), *self.folder.glob(f".*{TEMPORARY_SUFFIX}")):
            path.unlink()

    def save_directions(self, *, own: ProtectedSpace, after: ProtectedSpace) -> None:
        """Keeps the domain's leading directions, and what is protected from then on, in this order."""
        self.make_folder()
        own.save(self.folder / "directions.safetensors")
        after.save(self.folder / "protected.safetensors")

    def load_directions(self, geometry: Geometry) -> tuple[ProtectedSpace, ProtectedSpace] | None:
        """What save_directions kept: the domain's own, and what is protected. Raises ProtectedSpaceInvalid."""
        if not (self.folder / "protected.safetensors").exists():
            return None
        own = ProtectedSpace.load(self.folder / "directions.safetensors", geometry)
        return own, ProtectedSpace.load(self.folder / "protected.safetensors", geometry)

    def _experts_path(self, round: int) -> Path:
        return self.folder / f"round-{round}.experts.json"

    def _round_path(self, round: int) -> Path:
        return self.folder / f"round-{round}.json"
