"""Makes sheets to draw on and saves them. The only module that imports matplotlib; knows no reports.

Sizes are in inches; a saved picture has DOTS_PER_INCH pixels for each.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stack_store.atomic import replace_file
from training.errors import TrainingError

try:
    from matplotlib import colormaps as colormaps
    from matplotlib import style
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.image import AxesImage as AxesImage
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.ticker import FuncFormatter as FuncFormatter
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import NullLocator as NullLocator
except ModuleNotFoundError as error:
    raise TrainingError(f"figures need matplotlib: pip install -c constraints.txt -e '.[train]' ({error})") from error

DOTS_PER_INCH = 150
INK, PALE = "#333333", "#8a8a8a"
LETTER_WIDTH, LINE_HEIGHT = 0.075, 0.16  # of 9 point text, generously
LEAST_WIDTH = 5.0
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "figure.labelsize": 9,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """Everything drawn and saved inside looks the same, whatever the user's own matplotlib settings are."""
    with style.context(["default", STYLE]):
        yield


def new_sheet(*, width: float, height: float, title: str) -> Figure:
    """An empty sheet with a title, at least LEAST_WIDTH wide; the title's lines come on top of `height`."""
    width = max(width, LEAST_WIDTH)
    lines = textwrap.wrap(title, int(width / LETTER_WIDTH / 1.15))
    figure = Figure(figsize=(width, height + LINE_HEIGHT * 1.5 * len(lines)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(lines))
    return figure


def panel_sheet(
    names: Sequence[str], *, panel: tuple[float, float], most_columns: int, title: str, x_label: str, y_label: str
) -> tuple[Figure, list[Axes]]:
    """A sheet of small panels, one for each name; `panel` is the width and height of one, its own title apart."""
    rows = math.ceil(len(names) / most_columns)
    columns = math.ceil(len(names) / rows)
    letters = int(0.75 * panel[0] / LETTER_WIDTH)  # the axes are not all of the panel
    height = panel[1] + name_inches(names, letters)[1]
    figure = new_sheet(width=panel[0] * columns, height=height * rows + 0.3, title=title)
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat[: len(names)])
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(wrap_name(name, letters))
    for axes in panels[-columns:]:
        axes.set_xlabel(x_label)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.supylabel(y_label)
    return figure, panels


def wrap_name(name: str, width: int) -> str:
    """A name on as many lines as it needs, broken behind its hyphens and underscores where it has any."""
    lines = [""]
    for part in _parts(name, width):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def name_inches(names: Sequence[str], width: int) -> tuple[float, float]:
    """The width and height of the largest of these names when they are wrapped."""
    lines = [wrap_name(name, width).split("\n") for name in names]
    widest = max(len(line) for of_name in lines for line in of_name)
    return widest * LETTER_WIDTH, max(map(len, lines)) * LINE_HEIGHT


def save_sheet(figure: Figure, path: Path) -> None:
    """Writes the PNG atomically, its folder too; equal sheets give equal bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {str(path.parent)!r}: {error}") from error
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})


def _parts(name: str, width: int) -> Iterator[str]:
    part = ""
    for letter in name:
        part += letter
        if letter in "-_ " or len(part) == width:
            yield part
            part = ""
    if part:
        yield part
