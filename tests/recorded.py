"""Real results folders whose rounds hold known numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedinit.config import Run
from fedinit.experiment_file import load_experiment
from fedinit.results import RunFolder, summarize

ATTACK = "<script>alert(1)</script>"
INITIALIZATION = {
    "source": "random",
    "loaded": ["stem.weight", "stem.bias"],
    "fresh": ["head.weight"],
    "unused": ["classifier.weight"],
}
Lines = list[dict[str, Any]]


def record(tmp_path: Path, text: str, lines: Callable[[Run], Lines | None]) -> Path:
    """Write an experiment's results folder as if its runs had recorded these lines.

    Args:
        tmp_path: where the file and the folder go.
        text: the experiment file.
        lines: a run's rounds; None: the run fails.
    """
    file = tmp_path / "study.yaml"
    file.write_text(text)
    experiment = load_experiment(file)
    folder = tmp_path / "out"
    folder.mkdir()
    for label, run in experiment.runs.items():
        at = RunFolder(folder / label)
        if (rounds := lines(run)) is None:
            at.fail(f"RuntimeError: {ATTACK}")
            continue
        at.begin(run, INITIALIZATION)
        for line in rounds:
            at.append({"test_loss": None, "test_accuracy": None, "wall_seconds": 1.5} | line)
        at.finish({"weight": torch.zeros(1)})
    summarize(folder, experiment)
    return folder
