"""The figures and tables of the study that results can be shown as, by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import (
    alignment,
    client_gd,
    convergence,
    hessian,
    iid_gap,
    initial_loss,
    local_epochs,
    ranking,
    system_heterogeneity,
)
from fedinit import wording
from fedinit.errors import unknown
from fedinit.report import Finding

Study = Callable[[Path, dict[str, Any]], Finding]

STUDIES: dict[str, Study] = {
    module.__name__.rpartition(".")[2]: module.study
    for module in (
        ranking,
        convergence,
        local_epochs,
        iid_gap,
        system_heterogeneity,
        alignment,
        client_gd,
        hessian,
        initial_loss,
    )
}


def check_study(name: str | None) -> None:
    """Check the name that an experiment file gives.

    Raises:
        RequestError: there is no such study.
    """
    if name is not None and name not in STUDIES:
        raise unknown("study", name, STUDIES)


def find(folder: Path, summary: dict[str, Any]) -> Finding | None:
    """Return what the results say of the study that their summary names; None if it names none.

    Raises:
        RequestError: there is no such study, or a run's rounds cannot be read.
    """
    name = summary.get("study")
    check_study(name)
    if name is None:
        return None
    finding = STUDIES[name](folder, summary)
    left_out = wording.left_out(summary["runs"])
    return replace(finding, sentence=f"{finding.sentence} {left_out}") if left_out else finding
