"""What a results folder's rounds look like: one SVG for each measure, a panel for each data set.

Colour is the method and line style the initialization, the same in every figure. A figure is one
column of panels, so that it stays readable on a phone; the page sets figures side by side. Text
and axes are drawn in `currentColor`, so that a figure follows a light or a dark page.
"""

import csv
import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedinit.results import RunFolder

MEASURES = {
    "test_accuracy": "Test accuracy",
    "test_loss": "Test loss",
    "train_loss": "Train loss",
    "gradient_diversity": "Gradient diversity",
    "mean_pairwise_cosine": "Mean pairwise cosine",
}

_DATA = ("dataset", "dataset_args", "partition", "model", "model_args")
# Okabe and Ito's palette for colour-blind readers, less its black and yellow and with a lighter
# blue, so that each colour is seen on white and on near-black.
_PALETTE = ("#1A80C4", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: dict[str, Any] = {"pretrained": "-", "random": (0, (4, 1.6))}
_OTHER_DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
_INK = "#010203"  # drawn by nothing else, so that it can be replaced in the SVG's text
_LONGEST = 30
_LOG_SPAN = 100  # beyond this ratio a linear axis shows only the largest values
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
        ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color"), _INK
    ),
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Line:
    """One measure by round, averaged over the runs that differ in nothing but their seed."""

    settings: dict[str, Any]
    panel: str
    method: str
    initialization: str
    rounds: list[int]
    means: list[float]
    deviations: list[float | None]
    seeds: list[int]


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its file name's stem, its title, its SVG and the numbers that it plots."""

    name: str
    title: str
    svg: str
    csv: str


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
    """Return a setting's value on one short line; of a long path the end is kept."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{text[1 - _LONGEST :]}"


def draw_figures(folder: Path, summary: dict[str, Any]) -> list[Drawing]:
    """Draw every measure that the runs recorded; loss stands in where accuracy is missing.

    Args:
        folder: the results folder, which holds the run folders.
        summary: its summary, as `fedinit.results.read_summary` returns it.

    Raises:
        RequestError: a run's rounds cannot be read.
    """
    panel_keys, method_keys = split_settings(summary["varied"])
    rows = summary["runs"]
    while len(method_keys) > 1 and len({_method(row, method_keys) for row in rows}) > len(_PALETTE):
        panel_keys.append(method_keys.pop())  # more methods than colours: show one key as panels
    histories = {row["run"]: RunFolder(folder / row["run"]).rounds for row in rows}
    lines = {name: _lines(name, summary, histories, panel_keys, method_keys) for name in MEASURES}
    if len(lines["test_accuracy"]) == len(lines["test_loss"]):
        del lines["test_loss"]
    methods = list(dict.fromkeys(_method(row, method_keys) for row in rows))
    style = _Style(
        ", ".join(method_keys),
        dict(zip(methods, _colours(len(methods)), strict=True)),
        _dashes(list(dict.fromkeys(_initialization(row) for row in rows))),
    )
    return [
        Drawing(name, f"{MEASURES[name]} by round", _svg(name, drawn, style), _csv(name, drawn))
        for name, drawn in lines.items()
        if drawn
    ]


@dataclass(frozen=True)
class _Style:
    """How methods and initializations look, in every figure alike."""

    title: str
    colours: dict[str, Any]
    dashes: dict[str, Any]


def _method(row: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(shorten(row[key]) for key in keys)


def _initialization(row: dict[str, Any]) -> str:
    return shorten(row.get("initialization", ""))


def _colours(count: int) -> list[Any]:
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    # So many values of one setting are most often an ordered sweep; the map's ends are cut off
    # because they would vanish on a white or on a dark page.
    ramp = matplotlib.colormaps["viridis"]
    return [ramp(0.2 + 0.65 * index / (count - 1)) for index in range(count)]


def _dashes(initializations: list[str]) -> dict[str, Any]:
    if len(initializations) == 1:
        return {initializations[0]: "-"}
    others = [name for name in initializations if name not in _DASHES]
    return {
        name: _DASHES.get(name) or _OTHER_DASHES[others.index(name) % len(_OTHER_DASHES)]
        for name in initializations
    }


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
        groups.setdefault(str([row[key] for key in shown]), []).append(row)
    lines = []
    for rows in groups.values():
        values: dict[int, list[float]] = {}
        for row in rows:
            for line in histories[row["run"]]:
                if line.get(measure) is not None:
                    values.setdefault(line["round"], []).append(line[measure])
        if not values:
            continue
        by_round = sorted(values.items())
        lines.append(
            Line(
                settings={key: rows[0][key] for key in shown},
                panel=label(rows[0], panel_keys),
                method=_method(rows[0], method_keys),
                initialization=_initialization(rows[0]),
                rounds=[number for number, _ in by_round],
                means=[mean(found) for _, found in by_round],
                deviations=[stdev(found) if len(found) > 1 else None for _, found in by_round],
                seeds=[len(found) for _, found in by_round],
            )
        )
    return lines


def _csv(measure: str, lines: list[Line]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*lines[0].settings, "round", measure, "standard_deviation", "seeds"])
    for line in lines:
        for numbers in zip(line.rounds, line.means, line.deviations, line.seeds, strict=True):
            writer.writerow([*line.settings.values(), *numbers])
    return table.getvalue()


def _svg(measure: str, lines: list[Line], style: _Style) -> str:
    panels = list(dict.fromkeys(line.panel for line in lines))
    handles, columns = _legend(style)
    height = 0.35 + 1.95 * len(panels) + 0.2 * (bool(style.title) + -(-len(handles) // columns))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": measure}):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, sharey=measure == "test_accuracy")[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            _draw_panel(ax, [line for line in lines if line.panel == panel], style)
            ax.set_title(panel)
        for ax in axes:
            _scale(ax, measure, lines)
        axes[-1].set_xlabel("round")
        if handles:
            figure.legend(
                handles=handles,
                loc="outside upper left",
                ncols=columns,
                title=style.title,
                alignment="left",
            )
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(buffer.getvalue(), measure, _description(measure, lines))


def _legend(style: _Style) -> tuple[list[Line2D], int]:
    """Return the legend's entries, initializations on rows of their own, and its columns."""

    def entry(name: str, **look: Any) -> Line2D:
        return Line2D([], [], label=name, **look)

    methods = [entry(name, color=colour) for name, colour in style.colours.items()]
    starts = [entry(name, color=_INK, linestyle=dash) for name, dash in style.dashes.items()]
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
        colour = style.colours[line.method]
        ax.plot(
            line.rounds,
            line.means,
            color=colour,
            linestyle=style.dashes[line.initialization],
            marker="o" if len(line.rounds) == 1 else None,
        )
        if any(line.deviations):
            spread = [deviation or 0.0 for deviation in line.deviations]
            low = [value - half for value, half in zip(line.means, spread, strict=True)]
            high = [value + half for value, half in zip(line.means, spread, strict=True)]
            ax.fill_between(line.rounds, low, high, color=colour, alpha=0.18, linewidth=0)


def _scale(ax: Axes, measure: str, lines: list[Line]) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel(MEASURES[measure].lower())
    values = [value for line in lines for value in line.means]
    if measure == "test_accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
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


def _for_a_page(svg: str, name: str, description: str) -> str:
    """Make matplotlib's file a figure to inline: own ids, the page's text colour, a description."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
