"""Make experiments/gallery: each study's embedded run, its figure, numbers and sentence.

    python -m experiments.make_gallery [NAME...]

Runs `fedinit run NAME` for every study (or for those named), keeps the results under
results/gallery, where it goes on if it was interrupted, and writes the gallery's pages from them.
"""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from experiments.cli import EXPERIMENTS
from experiments.studies import STUDIES, find
from fedinit.report import Finding
from fedinit.results import read_summary, write_atomically

GALLERY, RESULTS = EXPERIMENTS / "gallery", Path("results/gallery")
_SECONDS = "gallery-seconds"  # beside a study's results: how long its command took
_HEADER = """\
# The study on embedded data

Each figure and table below is what its command ended with, on a machine of {cores} cores without a
GPU: Python {python}, {libraries}. The tasks are small (SqueezeNet 1.1 on 6,000 images of
Fashion-MNIST over 100 clients with Dirichlet(0.1) labels, a character model on Shakespeare by
role), the budgets are short and the seeds are few: the sentence under each says whether the outcome
agrees with the paper's. Rates are each arm's own ([rates.yaml](../rules/rates.yaml), by
`fedinit tune tuning`). Made by `python -m experiments.make_gallery`.
"""


def main(names: list[str]) -> None:
    """Run what has not been run, then write the gallery from every study that has results."""
    for name in names:
        _run(name)
    sections = []
    for name in STUDIES:
        folder = RESULTS / name
        if not (folder / _SECONDS).exists():
            continue
        finding = find(folder, read_summary(folder))
        if finding is not None:
            sections.append(_section(name, finding, float((folder / _SECONDS).read_text())))
            _copy(finding)
    header = _HEADER.format(
        cores=os.cpu_count(),
        python=platform.python_version(),
        libraries=", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray")),
    )
    write_atomically(GALLERY / "README.md", "\n".join([header, *sections]).encode())


def _run(name: str) -> None:
    folder = RESULTS / name
    if (folder / _SECONDS).exists():
        return
    since = time.perf_counter()
    resumed = folder.exists()
    command = ["fedinit", "run", name, "--out", str(folder), "--resume"]
    subprocess.run(command, check=True)  # noqa: S603 - our own command
    if resumed:
        print(f"{name} was interrupted before: its time is of the last part only", file=sys.stderr)
    write_atomically(folder / _SECONDS, f"{time.perf_counter() - since:.0f}".encode())


def _copy(finding: Finding) -> None:
    drawing = finding.drawing
    write_atomically(GALLERY / f"{drawing.name}.csv", drawing.csv.encode())
    if drawing.svg:  # on a page of its own there is nothing to follow: black on white
        svg = drawing.svg.replace("<svg", '<svg style="background: #fff"', 1)
        write_atomically(GALLERY / f"{drawing.name}.svg", svg.encode())


def _section(name: str, finding: Finding, seconds: float) -> str:
    about = (sys.modules[STUDIES[name].__module__].__doc__ or "").splitlines()[0]
    lines = [f"## {name}", "", about, "", finding.sentence, ""]
    if finding.table:
        header, *rows = finding.table
        for cells in (header, ["---"] * len(header), *rows):
            lines.append(f"| {' | '.join(cells)} |")
    else:
        lines.append(f"![{finding.sentence}]({name}.svg)")
    lines += ["", f"`fedinit run {name}`: {seconds / 60:.1f} minutes; [numbers]({name}.csv)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:] or list(STUDIES))
