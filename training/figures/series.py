"""Gives every named series one look, the same in every figure. Knows names and colours, not numbers."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.figures.canvas import Figure, Line2D, name_inches, wrap_name

Dash = Literal["-", "--", ":", "-."]

# Okabe and Ito 2008, "Color Universal Design", without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")
LEGEND_LETTERS = 36  # on a line, at most


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """How the lines of one series look."""

    colour: str
    dashes: Dash

    def as_line(self, *, marked: bool) -> dict[str, Any]:
        """What `plot` needs to draw it, with or without a mark at each point."""
        marker = {"marker": "o", "markersize": 2.5} if marked else {}
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": 1.4, **marker}

    def line(self, label: str) -> Line2D:
        """A line as a legend shows it."""
        return Line2D([], [], color=self.colour, linestyle=self.dashes, linewidth=1.8, label=label)


def series_styles(names: Iterable[str]) -> Mapping[str, SeriesStyle]:
    """A look by a name's place among all: 7 colours, then the same ones dashed."""
    return {
        name: SeriesStyle(COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])
        for index, name in enumerate(names)
    }


def legend_lines(styles: Mapping[str, SeriesStyle], names: Container[str]) -> list[Line2D]:
    """The lines of these names, in the order of all."""
    return [style.line(name) for name, style in styles.items() if name in names]


def draw_legend(figure: Figure, lines: Sequence[Line2D]) -> None:
    """One legend below the panels, in as many columns as fit; the sheet grows by its height."""
    names = [str(line.get_label()) for line in lines]
    width, height = name_inches(names, LEGEND_LETTERS)
    sheet_width, sheet_height = figure.get_size_inches()
    columns = min(len(names), max(1, int(sheet_width / (width + 0.6))))
    figure.set_size_inches(sheet_width, sheet_height + height * math.ceil(len(names) / columns) + 0.1)
    labels = [wrap_name(name, LEGEND_LETTERS) for name in names]
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, fontsize=8)
