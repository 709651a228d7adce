"""Table 1: the top Hessian eigenvalue at the initialization."""

from pathlib import Path
from typing import Any

from experiments.findings import (
    PRETRAINED,
    RANDOM,
    BySeed,
    Result,
    by_arm,
    from_both,
    spread,
    tasks,
    verdict,
)
from fedinit import wording
from fedinit.drawing import Drawing, to_csv
from fedinit.report import Finding

CLAIM = "the top Hessian eigenvalue at the initialization is smaller from pre-trained weights"
COLUMNS = {
    "hessian_algebraic": "largest eigenvalue",
    "hessian_absolute": "largest in absolute value",
    "hessian_algebraic_residual": "residual",
    "hessian_absolute_residual": "residual (absolute)",
    "hessian_products": "products",
}


def study(folder: Path, summary: dict[str, Any]) -> Finding:
    """Tabulate the eigenvalues; compare the largest one from either initialization."""
    found: dict[str, tuple[str, bool]] = {}
    table = [["task", "initialization", *COLUMNS.values()]]
    numbers: list[list[Any]] = []
    for task, results in tasks(folder, summary).items():
        columns = {name: _by_start(results, name) for name in COLUMNS}
        top = columns["hessian_algebraic"]
        for start in top:
            values = [spread(column[start]) for column in columns.values()]
            table.append([task, start, *(wording.spread(each, wording.number) for each in values)])
            flat = [number for each in values for number in (each.mean, each.deviation)]
            numbers.append([task, start, *flat])
        if pair := from_both(top):
            random, pretrained = (spread(pair[start]).mean for start in (RANDOM, PRETRAINED))
            told = (
                f"it is {wording.number(pretrained)} from pre-trained against "
                f"{wording.number(random)} from random weights"
            )
            found[task] = (told, pretrained < random)
    header = [
        "task",
        "initialization",
        *(text for name in COLUMNS for text in (name, f"{name}_standard_deviation")),
    ]
    drawing = Drawing("hessian", "Top Hessian eigenvalues", "", to_csv(header, numbers))
    return Finding(drawing, verdict(CLAIM, found), table)


def _by_start(results: list[Result], name: str) -> dict[str, BySeed]:
    """Return a column's values by seed.

    Of the largest in absolute value they are sizes where signs differ, as a mean would cancel them.
    """
    arms = by_arm(results, lambda r: r.start, lambda r: r.rounds[0].get(name))
    if name != "hessian_absolute":
        return arms
    return {
        start: {seed: abs(value) for seed, value in values.items()}
        if min(values.values()) < 0 < max(values.values())
        else values
        for start, values in arms.items()
    }
