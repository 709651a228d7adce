"""Figure 6: seven measures by round that say how far clients agree, and how far x has to go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    Result,
    by_arm,
    from_both,
    paired,
    tasks,
    verdict,
)
from fedinit import wording
from fedinit.drawing import PALETTE, Drawing, band, canvas, percent, to_csv
from fedinit.report import Finding
from fedinit.statistics import Spread

CLAIM = (
    "from pre-trained weights gradient diversity is lower, updates are more aligned and x starts "
    "nearer to its final value"
)
# The study's caption says cosine between client updates, its text between consecutive aggregated
# updates: both are drawn, the second one dotted.
PANELS = {
    "train_loss": "train loss",
    "train_accuracy": "train accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "gradient_diversity": "gradient diversity",
    "mean_pairwise_cosine": "cosine similarity",
    "distance": "L2 distance to final x",
}
BESIDE = {"mean_pairwise_cosine": "cosine_with_previous"}
Curves = dict[tuple[str, str, str], dict[int, Spread]]  # task, start, measure -> by round


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw the seven panels; compare diversity, cosine (means over rounds) and first distance."""
    curves: Curves = {}
    found = {}
    for task, results in tasks(folder, summary).items():
        pair = from_both(by_arm(results, lambda r: r.start, lambda r: r.rounds[-1]["test_loss"]))
        shown = paired(results, pair)
        for start in BOTH:
            at = [result for result in shown if result.start == start]
            for name in (*PANELS, *BESIDE.values()):
                if spreads := _by_round(at, name):
                    curves[task, start, name] = spreads
        if pair and all((task, start, name) in curves for start in BOTH for name in _COMPARED):
            found[task] = _compare(task, curves)
    sentence = verdict(CLAIM, found)
    drawn_tasks = list(dict.fromkeys(task for task, _, _ in curves))
    with canvas("alignment", 0.5 + 6.2 * len(drawn_tasks), sentence) as drawn:
        axes = drawn.panels(4 * len(drawn_tasks), 2)
        for index, task in enumerate(drawn_tasks):
            block = axes[8 * index : 8 * index + 8]
            for ax, (name, title) in zip(block, PANELS.items(), strict=False):
                _draw(ax, task, name, curves)
                ax.set_title(title if len(drawn_tasks) == 1 else f"{title}\n{task}", fontsize=8)
            for colour, start in zip(PALETTE, BOTH, strict=False):
                block[-1].plot([], [], color=colour, label=start)
            block[-1].plot(
                [], [], color="#888888", ls=":", label="cosine of consecutive\naggregates"
            )
            block[-1].legend(loc="center", fontsize=7)
            block[-1].axis("off")
    rows = (
        [task, start, name, number, each.mean, each.deviation, each.count]
        for (task, start, name), spreads in curves.items()
        for number, each in spreads.items()
    )
    header = ["task", "initialization", "measure", "round", "mean", "standard_deviation", "seeds"]
    drawing = Drawing("alignment", "Alignment of updates", drawn.svg, to_csv(header, rows))
    return Finding(drawing, sentence)


_COMPARED: dict[str, tuple[str, Callable[[list[float]], float], bool]] = {
    "gradient_diversity": ("mean gradient diversity", lambda v: sum(v) / len(v), False),
    "mean_pairwise_cosine": ("mean pairwise cosine", lambda v: sum(v) / len(v), True),
    "distance": ("distance of the initial to the final x", lambda v: v[0], False),
}


def _compare(task: str, curves: Curves) -> tuple[str, bool]:
    told, agrees = [], []
    for name, (words, reduced, higher) in _COMPARED.items():
        random, pretrained = (
            reduced([each.mean for each in curves[task, start, name].values()])
            for start in (RANDOM, PRETRAINED)
        )
        told.append(f"{words} {wording.number(pretrained)} against {wording.number(random)}")
        agrees.append(pretrained > random if higher else pretrained < random)
    return f"from pre-trained against random weights: {', '.join(told)}", all(agrees)


def _by_round(results: list[Result], name: str) -> dict[int, Spread]:
    values: dict[int, list[float]] = {}
    for result in results:
        line = (
            result.folder.distances
            if name == "distance"
            else {line["round"]: line.get(name) for line in result.rounds}
        )
        for number, value in line.items():
            if value is not None:
                values.setdefault(number, []).append(value)
    return {number: Spread.of(found) for number, found in sorted(values.items())}


def _draw(ax: Any, task: str, name: str, curves: Curves) -> None:
    for colour, start in zip(PALETTE, BOTH, strict=False):
        for measure, dash in ((name, "-"), (BESIDE.get(name, ""), ":")):
            if (task, start, measure) in curves:
                spreads = curves[task, start, measure]
                means = [each.mean for each in spreads.values()]
                ax.plot(list(spreads), means, color=colour, ls=dash, lw=1.1)
                band(ax, list(spreads), list(spreads.values()), color=colour)
    if name.endswith("accuracy"):
        percent(ax.yaxis)
    ax.set_xlabel("round", fontsize=7)
    ax.tick_params(labelsize=7)
