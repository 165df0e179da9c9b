"""Draws a table of numbers as coloured cells. Knows cells, not what they mean.

Letters: R rows, C columns. A cell without a number is None and drawn grey. Sizes are in inches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.figures.canvas import LETTER_WIDTH, Axes, AxesImage, Normalize, colormaps, name_inches, wrap_name

Matrix = tuple[tuple[float | None, ...], ...]

NO_NUMBER = "#dcdcdc"
DARK, LIGHT = "#1a1a1a", "#ffffff"
NAME_LETTERS = 22  # on a line, at most


@dataclass(frozen=True, slots=True)
class ColourScale:
    """Which colour a value gets."""

    colours: str
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class CellNames:
    """The names of rows and columns, and the room they need."""

    rows: Sequence[str]
    columns: Sequence[str]
    column_inches: float

    @property
    def left(self) -> float:
        """Width of the row names."""
        return name_inches(self.rows, NAME_LETTERS)[0] + 0.2

    @property
    def below(self) -> float:
        """Height of the column names, which are slanted by 45 degrees if they are not level."""
        width, height = name_inches(self.columns, NAME_LETTERS)
        return 0.2 + (height if self._is_level else 0.71 * (width + height))

    def write(self, axes: Axes) -> None:
        """Writes them beside and below the cells."""
        axes.set_yticks(range(len(self.rows)), [wrap_name(name, NAME_LETTERS) for name in self.rows])
        labels = [wrap_name(name, NAME_LETTERS) for name in self.columns]
        if self._is_level:
            axes.set_xticks(range(len(labels)), labels)
        else:
            axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", va="top", rotation_mode="anchor")

    @property
    def _is_level(self) -> bool:
        return max(map(len, self.columns)) * LETTER_WIDTH <= self.column_inches


def draw_cells(axes: Axes, values: Matrix, scale: ColourScale, *, square: bool) -> AxesImage:
    """Colours the (R, C) cells, which are square or fill the axes."""
    cells = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    image = axes.imshow(
        np.ma.masked_invalid(cells),
        cmap=colormaps[scale.colours].with_extremes(bad=NO_NUMBER),
        norm=Normalize(scale.lowest, scale.highest),
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in range(1, len(values)):
        axes.axhline(row - 0.5, color="white", linewidth=1)
    for column in range(1, len(values[0])):
        axes.axvline(column - 0.5, color="white", linewidth=1)
    return image


def write_cells(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]]) -> None:
    """Writes a text into each of the image's cells, dark on light and light on dark."""
    colours = np.asarray(image.to_rgba(np.ma.asarray(image.get_array())))  # (R, C, 4)
    light = colours[..., :3] @ np.array([0.299, 0.587, 0.114]) > 0.55  # luma, ITU-R BT.601
    for (row, column), is_light in np.ndenumerate(light):
        colour = DARK if is_light else LIGHT
        axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=8, color=colour)
