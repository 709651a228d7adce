"""Figure 4: the gap between IID and non-IID clients, from random and from pre-trained weights."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    BySeed,
    Result,
    by_arm,
    change,
    from_both,
    spread,
    tasks,
    verdict,
)
from fedinit.drawing import PALETTE, Drawing, canvas, percent, to_csv
from fedinit.report import Finding

CLAIM = "the gap between IID and non-IID clients closes when training starts pre-trained"
IID, NON_IID = "IID", "non-IID"
_WIDTH = 0.38  # of a bar


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw paired bars, IID beside non-IID, for each initialization; compare the two gaps."""
    found, bars = {}, {}
    compared = ["partition", "partition.kind", "partition.alpha"]
    for task, results in tasks(folder, summary, compared).items():
        for name, own in _by_skew(task, results).items():
            arms = by_arm(
                own,
                lambda r: (IID if r.run.partition.kind == "iid" else NON_IID, r.start),
                lambda r: r.final_accuracy,
            )
            if both := from_both(arms, IID, NON_IID):
                bars[name] = both
                found[name] = _compare(both)
    sentence = verdict(CLAIM, found)
    with canvas("iid_gap", 0.4 + 2.2 * len(bars), sentence) as drawn:
        axes = drawn.panels(len(bars))
        for ax, (task, arms) in zip(axes, bars.items(), strict=True):
            for offset, colour, kind in ((-0.5, PALETTE[0], IID), (0.5, PALETTE[1], NON_IID)):
                ends = [spread(arms[kind, start]) for start in BOTH]
                ax.bar(
                    [place + offset * _WIDTH for place in range(len(BOTH))],
                    [end.mean for end in ends],
                    _WIDTH,
                    yerr=[0.0 if end.count == 1 else end.deviation for end in ends],
                    color=colour,
                    label=kind,
                    error_kw={"elinewidth": 0.8, "ecolor": "#888888"},
                )
            ax.set_xticks(range(len(BOTH)), ["random", "pre-trained"])
            ax.grid(visible=False, axis="x")
            ax.set_ylabel("final test accuracy")
            percent(ax.yaxis)
            ax.set_title(task)
            ax.legend(loc="upper left")
    rows = (
        [task, kind, start, each.mean, each.deviation, each.count]
        for task, arms in bars.items()
        for (kind, start), each in ((arm, spread(values)) for arm, values in arms.items())
    )
    header = ["task", "partition", "initialization", "test_accuracy", "standard_deviation", "seeds"]
    drawing = Drawing("iid_gap", "IID against non-IID clients", drawn.svg, to_csv(header, rows))
    return Finding(drawing, sentence)


def _by_skew(task: str, results: list[Result]) -> dict[str, list[Result]]:
    """Return a task for each way to be non-IID; the runs with IID clients are in each."""
    by_skew: dict[str, list[Result]] = {}
    for result in results:
        partition = result.run.partition
        if partition.kind != "iid":
            alpha = f" {partition.alpha}" if partition.kind == "dirichlet" else ""
            by_skew.setdefault(f"{task}, {partition.kind}{alpha}", []).append(result)
    iid = [result for result in results if result.run.partition.kind == "iid"]
    return {name if len(by_skew) > 1 else task: iid + own for name, own in by_skew.items()}


def _compare(arms: dict[tuple[str, str], BySeed]) -> tuple[str, bool]:
    gaps = {start: (arms[NON_IID, start], arms[IID, start]) for start in BOTH}
    numbers = (
        f"IID clients end ahead of non-IID ones by {change(*gaps[PRETRAINED])}, from pre-trained "
        f"against {change(*gaps[RANDOM])}, from random weights"
    )
    size = {start: spread(iid).mean - spread(skewed).mean for start, (skewed, iid) in gaps.items()}
    return numbers, abs(size[PRETRAINED]) < size[RANDOM]
