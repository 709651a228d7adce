"""Figure 1: nine methods from random and from pre-trained weights, and how their order changes."""

from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    BySeed,
    by_arm,
    from_both,
    on_shared_seeds,
    spread,
    tasks,
    verdict,
)
from fedinit import wording
from fedinit.drawing import Drawing, canvas, colours, percent, to_csv
from fedinit.report import Finding
from fedinit.statistics import kendall_tau

CLAIM = "the methods change their order and end closer together when training starts pre-trained"
OPTIMIZERS = ("client.optimizer", "server.optimizer")
Method = tuple[str, str]


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw the slope chart between the two initializations; report Kendall's tau of the orders."""
    found: dict[str, tuple[str, bool]] = {}
    scores: dict[str, dict[Method, dict[str, BySeed]]] = {}
    for task, results in tasks(folder, summary, OPTIMIZERS).items():
        arms = by_arm(results, lambda each: (each.method, each.start), lambda r: r.final_accuracy)
        pairs = {method: from_both(arms, method) for method, start in arms if start == RANDOM}
        shared = on_shared_seeds({m: pair[m, RANDOM] for m, pair in pairs.items() if pair})
        if len(shared) > 1:
            scores[task] = {
                method: {
                    start: {seed: pairs[method][method, start][seed] for seed in seeds}
                    for start in BOTH
                }
                for method, seeds in shared.items()
            }
            found[task] = _compare(scores[task])
    titles = {task: f"{task}: {_tau(pairs)}" for task, pairs in scores.items()}
    described = "; ".join(f"{task} {numbers}" for task, (numbers, _) in found.items())
    with canvas("ranking", 0.2 + 3.6 * len(scores), f"Slope chart. {described}") as drawn:
        axes = drawn.panels(len(scores))
        for ax, (task, pairs) in zip(axes, scores.items(), strict=True):
            _draw(ax, titles[task], pairs)
    rows = (
        [task, *method, start, values.mean, values.deviation, values.count]
        for task, pairs in scores.items()
        for method, starts in pairs.items()
        for start, values in ((start, spread(starts[start])) for start in BOTH)
    )
    header = ["task", "client.optimizer", "server.optimizer", "initialization"]
    numbers = to_csv([*header, "test_accuracy", "standard_deviation", "seeds"], rows)
    return Finding(
        Drawing("ranking", "Methods from either initialization", drawn.svg, numbers),
        verdict(CLAIM, found),
    )


def _means(pairs: dict[Method, dict[str, BySeed]], start: str) -> list[float]:
    return [spread(starts[start]).mean for starts in pairs.values()]


def _tau(pairs: dict[Method, dict[str, BySeed]]) -> str:
    tau = kendall_tau(_means(pairs, RANDOM), _means(pairs, PRETRAINED))
    return f"Kendall's tau {'undefined' if isnan(tau) else f'{tau:.2f}'}"


def _compare(pairs: dict[Method, dict[str, BySeed]]) -> tuple[str, bool]:
    before, after = _means(pairs, RANDOM), _means(pairs, PRETRAINED)
    random, pretrained = max(before) - min(before), max(after) - min(after)
    reverses = any(
        (one[0] - other[0]) * (one[1] - other[1]) < 0
        for one, other in combinations(zip(before, after, strict=True), 2)
    )
    numbers = (
        f"{_tau(pairs)} between the two orders, and the {len(pairs)} methods end within "
        f"{wording.points(pretrained).lstrip('+')} of each other from pre-trained against "
        f"{wording.points(random).lstrip('+')} from random weights"
    )
    return numbers, reverses and pretrained < random


def _draw(ax: Axes, title: str, pairs: dict[Method, dict[str, BySeed]]) -> None:
    """Draw a line for each method from its accuracy on the left axis to that on the right."""
    servers = list(dict.fromkeys(server for _, server in pairs))
    clients = list(dict.fromkeys(client for client, _ in pairs))
    colour = dict(zip(servers, colours(len(servers)), strict=True))
    marker = dict(zip(clients, "osD^v*" * len(clients), strict=False))
    for (client, server), starts in pairs.items():
        ends = [spread(starts[start]) for start in BOTH]
        ax.errorbar(
            [0, 1],
            [end.mean for end in ends],
            yerr=[0.0 if end.count == 1 else end.deviation for end in ends],
            color=colour[server],
            marker=marker[client],
            markersize=4,
            elinewidth=0.7,
        )
    names = {method: f"{method[0]} + {method[1]}" for method in pairs}
    for x, start, align, gap in ((0, RANDOM, "right", -0.04), (1, PRETRAINED, "left", 0.04)):
        heights = _apart({m: spread(starts[start]).mean for m, starts in pairs.items()}, ax)
        for method, height in heights.items():
            ax.annotate(
                names[method],
                (x, spread(pairs[method][start]).mean),
                (x + gap, height),
                ha=align,
                va="center",
                fontsize=7,
                color=colour[method[1]],
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "lw": 0.3, "color": colour[method[1]], "shrinkB": 3},
            )
    ax.set_xlim(-1.25, 2.25)
    ax.set_xticks([0, 1], ["random", "pre-trained"])
    ax.spines[["left", "right"]].set_visible(True)
    percent(ax.yaxis)
    ax.set_ylabel("final test accuracy")
    right = ax.secondary_yaxis("right")
    percent(right.yaxis)
    right.spines["right"].set_visible(True)
    ax.set_title(title)


def _apart(heights: dict[Method, float], ax: Axes) -> dict[Method, float]:
    """Move labels apart, keeping their order, so that none covers another."""
    low, high = ax.get_ylim()
    gap = (high - low) / 22
    order = sorted(heights, key=heights.__getitem__)
    placed = [heights[order[0]]]
    for method in order[1:]:
        placed.append(max(heights[method], placed[-1] + gap))
    shift = sum(p - heights[m] for p, m in zip(placed, order, strict=True)) / len(order)
    shift = min(max(shift, placed[-1] - high), placed[0] - low)
    return {method: place - shift for method, place in zip(order, placed, strict=True)}
