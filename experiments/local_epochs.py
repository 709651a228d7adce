"""Figure 3: final test accuracy over the number of local epochs E."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    BySeed,
    by_arm,
    change,
    from_both,
    spread,
    tasks,
    verdict,
)
from fedinit.drawing import Drawing, band, canvas, dashes, percent, to_csv
from fedinit.report import Finding

CLAIM = "more local epochs hurt from random weights and do not from pre-trained ones"


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw final accuracy over E; compare the fewest local epochs with the most."""
    found, lines = {}, {}
    for task, results in tasks(folder, summary, ["client.epochs"]).items():
        arms = by_arm(
            results,
            lambda r: (r.run.client.epochs, r.start),
            lambda r: r.final_accuracy,
        )
        if not arms:
            continue  # targets are not labels
        pairs = {epochs: from_both(arms, epochs) for epochs, _ in sorted(arms)}
        lines[task] = {
            start: {epochs: arms[epochs, at] for epochs, at in sorted(arms) if at == start}
            for start in BOTH
        }
        every = [epochs for epochs, pair in pairs.items() if pair]
        if len(every) > 1 and (ends := from_both(arms, every[0], every[-1])):
            found[task] = _compare(every[0], every[-1], ends)
    sentence = verdict(CLAIM, found)
    dash = dashes(list(BOTH))
    with canvas("local_epochs", 0.5 + 2.1 * len(lines), sentence) as drawn:
        axes = drawn.panels(len(lines))
        for ax, (task, by_start) in zip(axes, lines.items(), strict=True):
            for start, values in by_start.items():
                spreads = [spread(each) for each in values.values()]
                means = [each.mean for each in spreads]
                ax.plot(list(values), means, marker="o", markersize=4, ls=dash[start], label=start)
                band(ax, list(values), spreads)
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(
                FixedLocator(sorted({e for each in by_start.values() for e in each}))
            )
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_ylim(bottom=0)
            percent(ax.yaxis)
            ax.set_title(task)
            ax.set_ylabel("final test accuracy")
            ax.set_xlabel("local epochs E")
            ax.legend()
    rows = (
        [task, epochs, start, each.mean, each.deviation, each.count]
        for task, by_start in lines.items()
        for start, values in by_start.items()
        for epochs, each in ((epochs, spread(found)) for epochs, found in values.items())
    )
    header = ["task", "client.epochs", "initialization", "test_accuracy"]
    numbers = to_csv([*header, "standard_deviation", "seeds"], rows)
    title = "Final accuracy by local epochs"
    return Finding(Drawing("local_epochs", title, drawn.svg, numbers), sentence)


def _compare(fewest: int, most: int, ends: dict[tuple[int, str], BySeed]) -> tuple[str, bool]:
    few, many = ({start: ends[epochs, start] for start in BOTH} for epochs in (fewest, most))
    numbers = (
        f"going from {fewest} to {most} local epochs changes the final test accuracy by "
        f"{change(few[PRETRAINED], many[PRETRAINED])}, from pre-trained weights against "
        f"{change(few[RANDOM], many[RANDOM])}, from random ones"
    )
    hurts = {start: spread(many[start]).mean < spread(few[start]).mean for start in BOTH}
    return numbers, hurts[RANDOM] and not hurts[PRETRAINED]
