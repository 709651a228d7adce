"""Table 2: the test loss at round 0."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    by_arm,
    from_both,
    spread,
    tasks,
    verdict_on_all,
)
from fedinit import wording
from fedinit.drawing import Drawing, to_csv
from fedinit.report import Finding

CLAIM = "the initial loss is not always lower from pre-trained weights"


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Tabulate the loss of x before the first round; the claim is of all tasks together."""
    losses = {}
    for task, results in tasks(folder, summary).items():
        arms = by_arm(results, lambda r: r.start, lambda r: r.rounds[0]["test_loss"])
        if pair := from_both(arms):
            losses[task] = {start: spread(values) for start, values in pair.items()}
    told = {
        task: f"it is {wording.number(starts[PRETRAINED].mean)} from pre-trained against "
        f"{wording.number(starts[RANDOM].mean)} from random weights"
        for task, starts in losses.items()
    }
    agrees = any(starts[PRETRAINED].mean >= starts[RANDOM].mean for starts in losses.values())
    header = ["task", "initialization", "initial_test_loss", "standard_deviation", "seeds"]
    rows, table = [], [["task", "initialization", "loss at round 0"]]
    for task, starts in losses.items():
        for start in BOTH:
            found = starts[start]
            rows.append([task, start, found.mean, found.deviation, found.count])
            table.append([task, start, wording.spread(found, wording.number)])
    drawing = Drawing("initial_loss", "Loss at round 0", "", to_csv(header, rows))
    return Finding(drawing, verdict_on_all(CLAIM, told, agrees), table)
