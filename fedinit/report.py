"""The report of a results folder: a self-contained HTML page, and the console's table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedinit import wording
from fedinit.drawing import Drawing
from fedinit.figures import MEASURES, draw_figures, label, shorten, split_settings
from fedinit.results import RunFolder, read_summary, write_atomically, writing
from fedinit.statistics import Spread, paired_difference

Setting = tuple[str, ...]  # a run's varied settings, but for its initialization and seed
BySeed = dict[int, float]
Pairs = dict[Setting, tuple[float, float]]  # the final result from one start and from another

_STATUS_STYLES = {
    "done": "green",
    "diverged": "magenta",
    "failed": "bold red",
    "unfinished": "yellow",
}


_RESULTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "final_test_accuracy": ("final accuracy", wording.share),
    "best_test_accuracy": ("best accuracy", wording.share),
    "final_test_loss": ("final loss", wording.number),
    "final_test_perplexity": ("final perplexity", wording.number),
    "best_test_loss": ("best loss", wording.number),
    "rounds_to_target": ("rounds to target", str),
    "failed_clients": ("failed clients", str),
    "wall_seconds": ("seconds", "{:.1f}".format),
}


@dataclass(frozen=True)
class _Measure:
    """A final result to compare: its name, and how a value and a difference of it are written."""

    name: str
    show: Callable[[float], str]
    show_change: Callable[[float], str]


_TEST_ACCURACY = _Measure("test accuracy", wording.share, wording.points)
_TEST_LOSS = _Measure("test loss", wording.number, wording.change)


@dataclass(frozen=True)
class Finding:
    """What results say of one of a study's figures or tables.

    Attributes:
        drawing: the figure, or a table's numbers where its SVG is empty.
        sentence: the study's claim, the numbers here, and whether they agree.
        table: rows of cells, the header first.
        replaces: the measure whose figure by round this drawing is.
    """

    drawing: Drawing
    sentence: str
    table: Sequence[Sequence[str]] = ()
    replaces: str | None = None


@dataclass(frozen=True)
class Comparison:
    """How runs end from each initialization, setting by setting, and what that says."""

    title: str
    keys: list[str]
    columns: list[str]
    rows: list[list[str]]
    paragraphs: list[str]


def write_report(folder: Path, finding: Finding | None = None) -> Path:
    """Write report.html, and figures/ with an SVG and a CSV for each measure, from the results.

    Args:
        folder: a results folder; its runs may have ended, be under way, or not yet begun.
        finding: what the page says first.

    Returns:
        The page's path.

    Raises:
        RequestError: the folder holds no results, or a run's rounds cannot be read.
        WriteError: the page or a figure cannot be written.
    """
    summary = read_summary(folder)
    others = [name for name in MEASURES if finding is None or name != finding.replaces]
    figures = draw_figures(folder, summary, others)
    with writing(folder / "figures"):
        (folder / "figures").mkdir(exist_ok=True)
    for figure in [*([finding.drawing] if finding else []), *figures]:
        for suffix, text in (("svg", figure.svg), ("csv", figure.csv)):
            if text:
                write_atomically(folder / "figures" / f"{figure.name}.{suffix}", text.encode())
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = _recorded(summary)
    page = templates.get_template("report.html").render(
        name=summary["name"],
        left_out=wording.left_out(summary["runs"]),
        varied=summary["varied"],
        finding=finding,
        comparison=compare_initializations(summary),
        figures=figures,
        results=[_RESULTS[column][0] for column in columns],
        runs=[_run_context(folder, summary["varied"], row, columns) for row in summary["runs"]],
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def console_table(summary: dict[str, Any]) -> Table:
    """Return the table that the command line prints: a row for each run.

    Args:
        summary: what `fedinit.results.summarize` or `read_summary` returned.
    """
    columns = _recorded(summary)
    if "final_test_accuracy" in columns:
        columns = [column for column in columns if not column.endswith("loss")]
    named = summary["varied"] or ["run"]
    table = Table(
        title=Text(summary["name"]),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for key in named:
        table.add_column(Text(key.replace(".", "\n")), no_wrap=True)
    table.add_column("status", no_wrap=True)
    for column in columns:
        table.add_column(_RESULTS[column][0].replace(" ", "\n"), justify="right", no_wrap=True)
    for row in summary["runs"]:
        table.add_row(
            *(Text(shorten(row[key])) for key in named),
            Text(row["status"], style=_STATUS_STYLES[row["status"]]),
            *_cells(row, columns),
        )
    return table


def compare_initializations(summary: dict[str, Any]) -> Comparison | None:
    """Compare the final results of the finished runs by initialization, averaged over seeds.

    Args:
        summary: what `fedinit.results.summarize` or `read_summary` returned.

    Returns:
        The table of differences from `random` (from the first initialization where it is absent)
        and a paragraph that follows from it; None where fewer than two initializations are varied.
    """
    starts = list(dict.fromkeys(str(row.get("initialization")) for row in summary["runs"]))
    if len(starts) == 1:
        return None
    base, *others = sorted(starts, key=lambda start: start != "random")
    measured = "final_test_accuracy" in _recorded(summary)
    measure = _TEST_ACCURACY if measured else _TEST_LOSS

    keys = [key for key in summary["varied"] if key not in ("initialization", "seed")]
    ends: dict[Setting, dict[str, BySeed]] = {}
    for row in summary["runs"]:
        setting = tuple(str(row[key]) for key in keys)
        by_start = ends.setdefault(setting, {start: {} for start in (base, *others)})
        value = row["final_test_accuracy" if measured else "final_test_loss"]
        if row["status"] == "done" and value is not None:
            by_start[str(row["initialization"])][row.get("seed", 0)] = value

    table = {
        setting: [
            *setting,
            *(
                wording.spread(Spread.of([*values.values()]) if values else None, measure.show)
                for values in by_start.values()
            ),
        ]
        for setting, by_start in ends.items()
    }
    paragraphs = []
    for other in others:
        pairs: Pairs = {}
        for setting, by_start in ends.items():
            found = paired_difference(by_start[base], by_start[other])
            table[setting].append(wording.difference(found, measure.show_change))
            if found is not None:
                seeds = by_start[base].keys() & by_start[other].keys()
                before, after = (
                    mean(by_start[start][seed] for seed in seeds) for start in (base, other)
                )
                pairs[setting] = (before, after)
        told = [
            _tell_difference(measure, base, other, pairs),
            *_tell_spread(measure, base, other, pairs, keys),
        ]
        paragraphs.append(" ".join(told))
    title = f"{base} against {' and '.join(others)}".replace("pretrained", "pre-trained")
    return Comparison(
        title=title[0].upper() + title[1:],
        keys=keys,
        columns=[base, *others, *(f"{other} {wording.MINUS} {base}" for other in others)],
        rows=list(table.values()),
        paragraphs=paragraphs,
    )


def _tell_difference(measure: _Measure, base: str, other: str, pairs: Pairs) -> str:
    if not pairs:
        return f"No setting has finished both from {base} and from {other} yet."
    change = {setting: after - before for setting, (before, after) in pairs.items()}
    average = measure.show_change(mean(change.values()))
    if len(pairs) == 1:
        [(before, after)] = pairs.values()
        return (
            f"Started from {other}, the final {measure.name} is {measure.show(after)}; "
            f"from {base} it is {measure.show(before)}: a difference of {average}."
        )
    higher = sum(value > 0 for value in change.values())
    low, high = (
        f"{measure.show_change(change[setting])} ({', '.join(setting)})"
        for setting in (min(change, key=change.__getitem__), max(change, key=change.__getitem__))
    )
    return (
        f"Started from {other}, the final {measure.name} is higher than from {base} in {higher} "
        f"of {len(pairs)} settings. The difference is {average} on average: "
        f"from {low} to {high}."
    )


def _tell_spread(
    measure: _Measure, base: str, other: str, pairs: Pairs, keys: list[str]
) -> list[str]:
    """Say how far apart the methods end on the same data, from either initialization."""
    data_keys, _ = split_settings(keys)
    on_data: dict[str, list[tuple[float, float]]] = {}
    for setting, pair in pairs.items():
        data = label(dict(zip(keys, setting, strict=True)), data_keys)
        on_data.setdefault(data, []).append(pair)
    sentences = []
    for data, found in on_data.items():
        if len(found) > 1:
            before, after = (
                measure.show_change(max(values) - min(values)).lstrip("+")
                for values in zip(*found, strict=True)
            )
            sentences.append(
                f"{f'On {data} the' if data else 'The'} {len(found)} methods end within {before} "
                f"of each other from {base}, and within {after} from {other}."
            )
    return sentences


def _recorded(summary: dict[str, Any]) -> list[str]:
    """Return the result columns that at least one run has a value in."""
    return [
        column for column in _RESULTS if any(row.get(column) is not None for row in summary["runs"])
    ]


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    return [wording.MISSING if row[key] is None else _RESULTS[key][1](row[key]) for key in columns]


def _run_context(
    folder: Path, varied: list[str], row: dict[str, Any], columns: list[str]
) -> dict[str, Any]:
    run = RunFolder(folder / row["run"])
    settings = run.path / "run.yaml"
    return {
        "name": row["run"],
        "status": row["status"],
        "rounds": row["rounds_done"],
        "settings": [row[key] for key in varied],
        "results": _cells(row, columns),
        "yaml": settings.read_text(encoding="utf-8") if settings.exists() else "",
        "initialization": run.initialization,
        "error": row["error"],
    }
