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
    title = "Methods under heterogeneity"
    drawing = curves("system_heterogeneity", title, folder, summary)
    return Finding(drawing, verdict(CLAIM, found), replaces="test_accuracy")


def _compare(by_start: dict[str, dict[tuple[str, str], BySeed]]) -> tuple[str, bool]:
    best: dict[str, list[tuple[str, str]]] = {}
    told = {}
    for start, methods in by_start.items():
        means = {method: spread(values).mean for method, values in methods.items()}
        most = max(means.values())
        best[start] = [method for method, mean in means.items() if mean == most]
        names = " and ".join(f"{client} clients + {server}" for client, server in best[start])
        told[start] = f"{names} ({wording.share(most)})"
    numbers = (
        f"the best is {told[PRETRAINED]} from pre-trained and {told[RANDOM]} from random weights"
    )
    built_for_it = all(client in BUILT_FOR_IT for client, _ in best[RANDOM])
    return numbers, best[PRETRAINED] == [FEDADAM] and built_for_it
