"""Which combinations of domains answer each domain's prompts best, as shares of its prompts. Paper, section 3.6.

Letters: R rows, the domains that prompts came from; C columns, combinations or domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from training.discovery.report import LabelReport
from training.figures.canvas import Figure, new_sheet
from training.figures.heat_map import CellNames, ColourScale, Matrix, draw_cells, write_cells
from training.figures.store_reports import StoreReports

COMBINATIONS_FILE, DOMAINS_FILE = "discovered_combinations.png", "discovered_domains.png"
TITLES = {
    COMBINATIONS_FILE: "Share of a domain's prompts for which a combination is best",
    DOMAINS_FILE: "Share of a domain's prompts whose best combination contains a domain",
}
CELL = (0.72, 0.42)  # inches
MOST_COMBINATIONS = 12
OTHERS = "all others"  # a space is in no combination's name


@dataclass(frozen=True, slots=True)
class ShareMap:
    """Shares of the prompts of each row, (R, C)."""

    file: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: Matrix


def gather(reports: StoreReports) -> tuple[ShareMap, ...]:
    """Both maps, or none if nothing was discovered for a domain of the store."""
    discovery = reports.discovery
    if discovery is None:
        return ()
    found = {name: discovery.labels[name] for name in reports.domains if name in discovery.labels}
    if not found:
        return ()
    domains = tuple(discovery.stack_digests)
    contained = tuple(tuple(report.shares[name] for name in domains) for report in found.values())
    return (_combinations(found), ShareMap(DOMAINS_FILE, tuple(found), domains, contained))


def draw(shares: ShareMap) -> Figure:
    """Cells that show the share in percent, the darker the more."""
    width, height = CELL[0] * len(shares.columns), CELL[1] * len(shares.rows)
    names = CellNames(shares.rows, shares.columns, column_inches=CELL[0])
    figure = new_sheet(
        width=width + names.left + 1.5, height=max(height + names.below, 1.6) + 0.5, title=TITLES[shares.file]
    )
    axes = figure.subplots()
    image = draw_cells(axes, shares.shares, ColourScale("Blues", 0.0, 1.0), square=False)
    write_cells(axes, image, [[f"{share:.0%}" for share in row if share is not None] for row in shares.shares])
    names.write(axes)
    axes.set(ylabel="prompts of")
    figure.colorbar(image, ax=axes, label="share of the prompts")
    return figure


def _combinations(found: Mapping[str, LabelReport]) -> ShareMap:
    """The most frequent combinations, each label counting alike; what is left of each row is the last column's."""
    of_row = [{name: count / report.prompts for name, count in report.wins.items()} for report in found.values()]
    totals: dict[str, float] = {}
    for row in of_row:
        for name, share in row.items():
            totals[name] = totals.get(name, 0.0) + share
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    shown, others = ranked[:MOST_COMBINATIONS], ranked[MOST_COMBINATIONS:]
    shares = [
        [*(row.get(name, 0.0) for name in shown), *([sum(row.get(name, 0.0) for name in others)] if others else [])]
        for row in of_row
    ]
    columns = (*shown, *([OTHERS] if others else []))
    return ShareMap(COMBINATIONS_FILE, tuple(found), columns, tuple(map(tuple, shares)))
