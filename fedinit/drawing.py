"""The look that every figure shares, and from a matplotlib figure to an SVG for the page.

Text and axes are drawn in `currentColor`, so that a figure follows a light or a dark page. A figure
is one narrow column, so that it stays readable on a phone; the page sets figures side by side.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedinit.statistics import Spread
from fedinit.wording import cell

WIDTH = 4.2  # inches
# Okabe and Ito's palette for colour-blind readers, less its black and yellow and with a lighter
# blue, so that each colour is seen on white and on near-black.
PALETTE = ("#1A80C4", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#010203"  # drawn by nothing else, so that it can be replaced in the SVG's text
_DASHES: dict[str, Any] = {"pretrained": "-", "random": (0, (4, 1.6))}
_OTHER_DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.title_fontsize": 9.5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color"), INK
    ),
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its file name's stem, its title, its SVG and the numbers that it plots."""

    name: str
    title: str
    svg: str
    csv: str

    @property
    def on_white(self) -> str:
        """The SVG for a page that is not ours, and has no colours that it could follow."""
        return self.svg.replace("<svg", '<svg style="background: #fff"', 1)


class Canvas:
    """A figure under way; `svg` is set when the `canvas` block ends, and empty without panels."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""

    def panels(self, rows: int, columns: int = 1, **shared: Any) -> list[Axes]:
        """Return the axes of so many panels, row by row; none for no rows."""
        if not rows:
            return []
        return list(self.figure.subplots(rows, columns, squeeze=False, **shared).flat)


@contextmanager
def canvas(name: str, height: float, description: str) -> Iterator[Canvas]:
    """Draw in the shared look, then encode.

    Args:
        name: the figure's, unique on a page: its SVG's ids are made from it.
        height: in inches; the width is the page's column.
        description: the alternative text.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        drawn = Canvas(Figure(figsize=(WIDTH, height), layout="constrained"))
        yield drawn
        if drawn.figure.axes:
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            drawn.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
            drawn.svg = _for_a_page(buffer.getvalue(), name, description)


def dashes(initializations: list[str]) -> dict[str, Any]:
    """Return a line style for each initialization: pretrained solid, random dashed."""
    if len(initializations) == 1:
        return {initializations[0]: "-"}
    others = [name for name in initializations if name not in _DASHES]
    return {
        name: _DASHES.get(name) or _OTHER_DASHES[others.index(name) % len(_OTHER_DASHES)]
        for name in initializations
    }


def colours(count: int) -> list[Any]:
    """Return so many colours; beyond the palette they run through a map, as a sweep's values do."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    # The map's ends are cut off because they would vanish on a white or on a dark page.
    ramp = matplotlib.colormaps["viridis"]
    return [ramp(0.2 + 0.65 * index / (count - 1)) for index in range(count)]


def percent(axis: Any) -> None:
    """Label an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def band(ax: Axes, at: Sequence[float], spreads: Sequence[Spread], **look: Any) -> None:
    """Shade one standard deviation on either side of the means; one that is nan shades nothing."""
    low = [spread.mean - spread.deviation for spread in spreads]
    high = [spread.mean + spread.deviation for spread in spreads]
    ax.fill_between(at, low, high, alpha=0.18, linewidth=0, **look)


def to_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV; a number that does not exist (nan) is an empty cell."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([None if value != value else cell(value) for value in row])  # noqa: PLR0124
    return table.getvalue()


def _for_a_page(svg: str, name: str, description: str) -> str:
    """Make matplotlib's file a figure to inline: own ids, the page's text colour, a description."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
