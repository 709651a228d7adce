"""Figure 5: methods when some of each round's clients train for longer, by round."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    BOTH,
    PRETRAINED,
    RANDOM,
    BySeed,
    by_arm,
    curves,
    on_shared_seeds,
    spread,
    tasks,
    verdict,
)
from fedinit import wording
from fedinit.report import Finding

CLAIM = (
    "with system heterogeneity FedAdam with SGD clients is best from pre-trained weights and the "
    "methods built for heterogeneity (proximal, nova, mimelite clients) win from random ones"
)
OPTIMIZERS = ("client.optimizer", "server.optimizer")
BUILT_FOR_IT = ("proximal", "nova", "mimelite")
FEDADAM = ("sgd", "adam")


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Draw accuracy by round and method; name the best method from either initialization."""
    found = {}
    for task, results in tasks(folder, summary, OPTIMIZERS).items():
        arms = by_arm(results, lambda r: (r.start, r.method), lambda r: r.final_accuracy)
        by_start = {
            start: on_shared_seeds({method: arms[at, method] for at, method in arms if at == start})
            for start in BOTH
        }
        if all(len(methods) > 1 for methods in by_start.values()):
            found[task] = _compare(by_start)
    drawing = curves("system_heterogeneity", "Methods under heterogeneity", folder, summary)
    return Finding(drawing, verdict(CLAIM, found), replaces="test_accuracy")


def _compare(by_start: dict[str, dict[tuple[str, str], BySeed]]) -> tuple[str, bool]:
    best, told = {}, {}
    for start, methods in by_start.items():
        means = {method: spread(values).mean for method, values in methods.items()}
        best[start] = max(means, key=means.__getitem__)
        client, server = best[start]
        told[start] = f"{client} clients + {server} ({wording.share(means[best[start]])})"
    numbers = (
        f"the best is {told[PRETRAINED]} from pre-trained and {told[RANDOM]} from random weights"
    )
    return numbers, best[PRETRAINED] == FEDADAM and best[RANDOM][0] in BUILT_FOR_IT
