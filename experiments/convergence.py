"""Figure 2: test accuracy by round from random and from pre-trained weights."""

from pathlib import Path
from statistics import mean
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    BySeed,
    Result,
    against,
    by_arm,
    curves,
    from_both,
    paired,
    spread,
    tasks,
    verdict,
)
from fedinit.report import Finding

CLAIM = "training from pre-trained weights is faster and ends higher"


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw accuracy by round; compare the ends, and when pre-trained passes random's end."""
    found = {}
    for task, results in tasks(folder, summary).items():
        arms = by_arm(results, lambda r: r.start, lambda r: r.final_accuracy)
        if pair := from_both(arms):
            random, pretrained = pair[RANDOM], pair[PRETRAINED]
            found[task] = _compare(paired(results, pair), random, pretrained)
    drawing = curves("convergence", "Accuracy by round", folder, summary)
    return Finding(drawing, verdict(CLAIM, found), replaces="test_accuracy")


def _compare(results: list[Result], random: BySeed, pretrained: BySeed) -> tuple[str, bool]:
    """Word the comparison; it agrees if pre-trained ends higher and is at random's end sooner."""
    target, last = spread(random).mean, results[0].rounds[-1]["round"]
    own, passed = (
        _first([result for result in results if result.start == start], target) for start in BOTH
    )
    numbers = f"the final test accuracy is {against(random, pretrained)}"
    if passed is None:
        return f"{numbers}, and random's end is never reached", False
    numbers += f", and random's end is reached by round {passed} of {last}"
    if own is not None and own < last:
        last = own
        numbers += f", from random weights by round {own}"
    return numbers, spread(pretrained).mean > target and passed < last


def _first(results: list[Result], target: float) -> int | None:
    """Return the first round in which the mean test accuracy of some runs is at a target."""
    by_round: dict[int, list[float]] = {}
    for result in results:
        for line in result.rounds:
            if line["test_accuracy"] is not None:
                by_round.setdefault(line["round"], []).append(line["test_accuracy"])
    passed = (number for number, found in sorted(by_round.items()) if mean(found) >= target)
    return next(passed, None)
