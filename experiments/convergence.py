"""Figure 2: test accuracy by round from random and from pre-trained weights."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    PRETRAINED,
    RANDOM,
    BySeed,
    Result,
    against,
    by_arm,
    curves,
    from_both,
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
            starts = [r for r in results if r.start == PRETRAINED and r.run.seed in pretrained]
            found[task] = _compare(starts, random, pretrained)
    drawing = curves("convergence", "Accuracy by round", folder, summary)
    return Finding(drawing, verdict(CLAIM, found), replaces="test_accuracy")


def _compare(results: list[Result], random: BySeed, pretrained: BySeed) -> tuple[str, bool]:
    """Word the comparison; it agrees if pre-trained is ahead at the end and had passed before."""
    target = spread(random).mean
    by_round: dict[int, list[float]] = {}
    for result in results:
        for line in result.rounds:
            if line["test_accuracy"] is not None:
                by_round.setdefault(line["round"], []).append(line["test_accuracy"])
    passed = [
        number for number, found in sorted(by_round.items()) if sum(found) / len(found) >= target
    ]
    numbers = f"the final test accuracy is {against(random, pretrained)}"
    if not passed:
        return f"{numbers}, and random's end is never reached", False
    last = max(by_round)
    numbers += f", and random's end is reached by round {passed[0]} of {last}"
    return numbers, spread(pretrained).mean > target and passed[0] < last
