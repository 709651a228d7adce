"""Figure 8: FedAdam with clients that send one full-batch gradient, against local SGD."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    by_arm,
    change,
    curves,
    from_both,
    spread,
    tasks,
    verdict,
)
from fedinit.report import Finding

CLAIM = "from pre-trained weights a gradient step (gd) nearly matches local SGD, unlike from random"


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw accuracy by round; compare how far gd clients end behind sgd clients."""
    found = {}
    for task, results in tasks(folder, summary, ["client.optimizer"]).items():
        arms = by_arm(
            results,
            lambda r: (r.run.client.optimizer, r.start),
            lambda r: r.final_accuracy,
        )
        if both := from_both(arms, "sgd", "gd"):
            pairs = {start: (both["gd", start], both["sgd", start]) for start in BOTH}
            lead = {start: spread(sgd).mean - spread(gd).mean for start, (gd, sgd) in pairs.items()}
            numbers = (
                f"sgd clients end ahead of gd ones by {change(*pairs[PRETRAINED])}, from "
                f"pre-trained against {change(*pairs[RANDOM])}, from random weights"
            )
            found[task] = (numbers, abs(lead[PRETRAINED]) < lead[RANDOM])
    drawing = curves("client_gd", "Local SGD against one gradient", folder, summary)
    return Finding(drawing, verdict(CLAIM, found), replaces="test_accuracy")
