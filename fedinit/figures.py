"""What a results folder's rounds look like: one SVG for each measure, a panel for each data set.

Colour is the method and line style the initialization, the same in every figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedinit.drawing import INK, PALETTE, Drawing, band, canvas, colours, dashes, percent, to_csv
from fedinit.errors import one_line
from fedinit.results import DIVERGED, DONE, RunFolder
from fedinit.statistics import Spread

MEASURES = {
    "test_accuracy": "Test accuracy",
    "test_loss": "Test loss",
    "test_perplexity": "Test perplexity",
    "train_loss": "Train loss",
    "gradient_diversity": "Gradient diversity",
    "mean_pairwise_cosine": "Mean pairwise cosine",
}

_DATA = ("dataset", "dataset_args", "partition", "model", "model_args")
_LONGEST = 30
_LOG_SPAN = 100  # beyond this ratio a linear axis shows only the largest values


@dataclass(frozen=True)
class Line:
    """One measure by round, averaged over the runs that differ in nothing but their seed."""

    settings: dict[str, Any]
    panel: str
    method: str
    initialization: str
    rounds: list[int]
    spreads: list[Spread]

    @property
    def means(self) -> list[float]:
        """The mean by round."""
        return [spread.mean for spread in self.spreads]


def split_settings(varied: list[str]) -> tuple[list[str], list[str]]:
    """Return the varied keys that choose data or model, and those that choose the method."""
    data = [key for key in varied if key.split(".")[0] in _DATA]
    return data, [key for key in varied if key not in (*data, "initialization", "seed")]


def label(row: dict[str, Any], keys: list[str]) -> str:
    """Name a run by its settings; a data set or a model needs no key before its name."""
    return ", ".join(
        shorten(row[key]) if key in ("dataset", "model") else f"{key} = {shorten(row[key])}"
        for key in keys
    )


def shorten(value: Any) -> str:
    """Return a setting's value on one short line; of a long path the end is kept.

    Where there is more, four digits tell it from another with the same end.
    """
    text = one_line(value)
    if len(text) <= _LONGEST:
        return text
    return f"\N{HORIZONTAL ELLIPSIS}{text[6 - _LONGEST :]} {crc32(text.encode()) % 0x10000:04x}"


def draw_figures(
    folder: Path, summary: dict[str, Any], measures: Sequence[str] = tuple(MEASURES)
) -> list[Drawing]:
    """Draw every measure that the runs recorded; loss stands in where accuracy is missing.

    Args:
        folder: the results folder, which holds the run folders.
        summary: its summary, as `fedinit.results.read_summary` returns it.
        measures: which to draw.

    Raises:
        RequestError: a run's rounds cannot be read.
    """
    panel_keys, method_keys = split_settings(summary["varied"])
    rows = summary["runs"]
    while len(method_keys) > 1 and len({_method(row, method_keys) for row in rows}) > len(PALETTE):
        panel_keys.append(method_keys.pop())  # more methods than colours: show one key as panels
    histories = {row["run"]: RunFolder(folder / row["run"]).rounds for row in rows}
    lines = {name: _lines(name, summary, histories, panel_keys, method_keys) for name in MEASURES}
    if len(lines["test_accuracy"]) == len(lines["test_loss"]):
        del lines["test_loss"]
    methods = list(dict.fromkeys(_method(row, method_keys) for row in rows))
    starts = list(dict.fromkeys(_initialization(row) for row in rows))
    by_method = len(methods) > 1
    coloured = methods if by_method else starts
    style = _Style(
        ", ".join(method_keys),
        by_method,
        dict(zip(coloured, colours(len(coloured)), strict=True)),
        dashes(starts),
    )
    return [
        Drawing(name, f"{MEASURES[name]} by round", _svg(name, drawn, style), _csv(name, drawn))
        for name, drawn in lines.items()
        if drawn and name in measures
    ]


@dataclass(frozen=True)
class _Style:
    """How methods and initializations look, in every figure alike.

    Attributes:
        title: the legend's.
        by_method: whether colours tell methods; otherwise, there being one, initializations.
        colours: by method or by initialization.
        dashes: by initialization.
    """

    title: str
    by_method: bool
    colours: dict[str, Any]
    dashes: dict[str, Any]

    def colour(self, method: str, initialization: str) -> Any:
        """Return a line's colour."""
        return self.colours[method if self.by_method else initialization]


def _method(row: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(shorten(row[key]) for key in keys)


def _initialization(row: dict[str, Any]) -> str:
    return shorten(row.get("initialization", ""))


def _lines(
    measure: str,
    summary: dict[str, Any],
    histories: dict[str, list[dict[str, Any]]],
    panel_keys: list[str],
    method_keys: list[str],
) -> list[Line]:
    shown = [key for key in summary["varied"] if key != "seed"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in summary["runs"]:
        if row["status"] != DIVERGED:
            groups.setdefault(str([row[key] for key in shown]), []).append(row)
    lines = []
    for rows in groups.values():
        values: dict[int, list[float]] = {}
        # A mean is of the same runs in every round, but for numbers that are not finite: of those
        # broken off only while none is done.
        ended = [row for row in rows if row["status"] == DONE]
        for row in ended or rows:
            for line in histories[row["run"]]:
                if line.get(measure) is not None:
                    values.setdefault(line["round"], []).append(line[measure])
        if not values:
            continue
        lines.append(
            Line(
                settings={key: rows[0][key] for key in shown},
                panel=label(rows[0], panel_keys),
                method=_method(rows[0], method_keys),
                initialization=_initialization(rows[0]),
                rounds=sorted(values),
                spreads=[Spread.of(found) for _, found in sorted(values.items())],
            )
        )
    return lines


def _csv(measure: str, lines: list[Line]) -> str:
    return to_csv(
        [*lines[0].settings, "round", measure, "standard_deviation", "seeds"],
        (
            [*line.settings.values(), number, spread.mean, spread.deviation, spread.count]
            for line in lines
            for number, spread in zip(line.rounds, line.spreads, strict=True)
        ),
    )


def _svg(measure: str, lines: list[Line], style: _Style) -> str:
    panels = list(dict.fromkeys(line.panel for line in lines))
    handles, columns = _legend(style)
    height = 0.35 + 1.95 * len(panels) + 0.2 * (bool(style.title) + -(-len(handles) // columns))
    with canvas(measure, height, _description(measure, lines)) as drawn:
        axes = drawn.panels(len(panels), sharey=measure == "test_accuracy")
        for panel, ax in zip(panels, axes, strict=True):
            _draw_panel(ax, [line for line in lines if line.panel == panel], style)
            ax.set_title(panel)
        for ax in axes:
            _scale(ax, measure, lines)
        axes[-1].set_xlabel("round")
        if handles:
            drawn.figure.legend(
                handles=handles,
                loc="outside upper left",
                ncols=columns,
                title=style.title,
                alignment="left",
            )
    return drawn.svg


def _legend(style: _Style) -> tuple[list[Line2D], int]:
    """Return the legend's entries, initializations on rows of their own, and its columns."""

    def entry(name: str, **look: Any) -> Line2D:
        return Line2D([], [], label=name, **look)

    shown = style.colours.items() if style.by_method else ()
    methods = [entry(name, color=colour) for name, colour in shown]
    starts = [
        entry(name, color=INK if style.by_method else style.colours[name], linestyle=dash)
        for name, dash in style.dashes.items()
    ]
    groups = [group for group in (methods, starts) if len(group) > 1]
    longest = max((len(str(found.get_label())) for group in groups for found in group), default=0)
    columns = 2 if longest <= _LONGEST // 2 else 1
    by_row = [
        found
        for group in groups
        for found in group + [entry("", alpha=0)] * (-len(group) % columns)
    ]
    # matplotlib fills a legend column by column
    return [found for column in range(columns) for found in by_row[column::columns]], columns


def _draw_panel(ax: Axes, lines: list[Line], style: _Style) -> None:
    for line in lines:
        colour = style.colour(line.method, line.initialization)
        ax.plot(
            line.rounds,
            line.means,
            color=colour,
            linestyle=style.dashes[line.initialization],
            marker="o" if len(line.rounds) == 1 else None,
        )
        band(ax, line.rounds, line.spreads, color=colour)


def _scale(ax: Axes, measure: str, lines: list[Line]) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel(MEASURES[measure].lower())
    values = [value for line in lines for value in line.means]
    if measure == "test_accuracy":
        percent(ax.yaxis)
        ax.set_ylim(bottom=0.0)
    elif min(values) > 0 and max(values) > _LOG_SPAN * min(values):
        ax.set_yscale("log")


def _description(measure: str, lines: list[Line]) -> str:
    form = ".1%" if measure == "test_accuracy" else ".3g"
    last = (
        f"{', '.join(filter(None, (line.panel, line.method, line.initialization))) or 'the run'} "
        f"{line.means[-1]:{form}} at round {line.rounds[-1]}"
        for line in lines
    )
    return f"{MEASURES[measure]} by round. Last values: {'; '.join(last)}."
