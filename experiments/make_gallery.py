"""Make experiments/gallery: what commands ended with, their figures, numbers and sentences.

    python -m experiments.make_gallery [--data DIR] [NAME...]

Runs `fedinit run NAME` for every study and, with the folder of their data, for the experiments of
real_data/ (or for those named), keeps the results under results/gallery, where it goes on if it was
interrupted, and writes the gallery's pages from them.
"""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from experiments.cli import EXPERIMENTS
from experiments.studies import STUDIES, find
from fedinit.errors import unknown
from fedinit.report import Finding
from fedinit.results import RunFolder, read_summary, write_atomically

GALLERY, RESULTS = EXPERIMENTS / "gallery", Path("results/gallery")
_SECONDS = "gallery-seconds"  # beside an experiment's results: how long its command took
_HEADER = """\
# The study on embedded data

Each figure and table below is what its command ended with, on a machine of {cores} cores without a
GPU: Python {python}, {libraries}. The tasks are small (SqueezeNet 1.1 on 6,000 images of
Fashion-MNIST over 100 clients with Dirichlet(0.1) labels, a character model on Shakespeare by
role), the budgets are short and the seeds are few: the sentence under each says whether the outcome
agrees with the paper's. Rates are each arm's own ([rates.yaml](../rules/rates.yaml), by
`fedinit tune tuning`). Made by `python -m experiments.make_gallery`.
"""
_REAL_HEADER = """\
# Real clients and larger data

From files on disk, one seed, rates not tuned on these data: each shows that its data, models and
initializations run end to end, not what the study measured. Each page is the run's whole report.
"""


@dataclass(frozen=True)
class RealData:
    """An experiment of real_data/: where its files were, and what they are."""

    folder: str
    about: str


REAL_DATA = {
    "cifar10": RealData(
        "cifar10-jpeg",
        "CIFAR-10, its images re-encoded as JPEG (lossy), over 100 clients with Dirichlet(0.1) "
        "labels: SqueezeNet **1.1** (the paper has 1.0) from ImageNet's weights, ResNet-18 from a "
        "proxy, 4 epochs of 6,000 images of Fashion-MNIST; FedAdam, 20 rounds.",
    ),
    "digits": RealData(
        "mnist-writers",
        "MNIST's test digits by their 297 real writers, a tenth of whom are the test set: **ten "
        "digits**, not FEMNIST's 62 characters; SqueezeNet 1.1, FedAdam, 40 rounds.",
    ),
    "posts": RealData(
        "stackexchange-beer",
        "Posts of beer.stackexchange.com by their users (**not** Stack Overflow): the next "
        "character with charrnn, from Reddit's weights; the next word with charlm, from a proxy, 2 "
        "epochs of 20,000 rows of Shakespeare's words; FedAdam, 30 rounds. Accuracy is by "
        "character or word.",
    ),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of the real data.")] = None,
) -> None:
    """Run what has not been run, then write the gallery from everything that has results."""
    for name in names or [*STUDIES, *(REAL_DATA if data else ())]:
        if name in STUDIES:
            _run(name, name)
        elif name in REAL_DATA and data is not None:
            folder = (data / REAL_DATA[name].folder).resolve()
            file = EXPERIMENTS / "real_data" / f"{name}.yaml"
            _run(name, str(file), "--set", f"dataset_args.data_dir={folder}")
        else:
            raise unknown("name", name, [*STUDIES, *REAL_DATA])
    header = _HEADER.format(
        cores=os.cpu_count(),
        python=platform.python_version(),
        libraries=", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray")),
    )
    sections = [section for name in STUDIES if (section := _section(name, _about(name)))]
    real = [section for name, each in REAL_DATA.items() if (section := _section(name, each.about))]
    text = "\n".join([header, *sections, *([_REAL_HEADER, *real] if real else [])])
    write_atomically(GALLERY / "README.md", text.encode())


def _about(name: str) -> str:
    return (sys.modules[STUDIES[name].__module__].__doc__ or "").splitlines()[0]


def _run(name: str, *arguments: str) -> None:
    folder = RESULTS / name
    if (folder / _SECONDS).exists():
        return
    since = time.perf_counter()
    resumed = folder.exists()
    command = ["fedinit", "run", *arguments, "--out", str(folder), "--resume"]
    subprocess.run(command, check=True)  # noqa: S603 - our own command
    if resumed:
        print(f"{name} was interrupted before: its time is of the last part only", file=sys.stderr)
    write_atomically(folder / _SECONDS, f"{time.perf_counter() - since:.0f}".encode())


def _section(name: str, about: str) -> str:
    """Copy what an experiment ended with into the gallery; return its words, "" before it has."""
    folder = RESULTS / name
    if not (folder / _SECONDS).exists():
        return ""
    finding = find(folder, read_summary(folder))
    if finding is None:
        return ""
    _copy(name, finding)
    lines = [f"## {name}", "", about, "", finding.sentence, ""]
    if finding.table:
        header, *rows = finding.table
        for cells in (header, ["---"] * len(header), *rows):
            lines.append(f"| {' | '.join(cells)} |")
    else:
        lines.append(f"![{finding.sentence}]({name}.svg)")
    link, command = "", f"fedinit run {name}"
    if name in REAL_DATA:
        page = (folder / "report.html").read_text(encoding="utf-8")
        any_run = RunFolder(folder / read_summary(folder)["runs"][0]["run"]).run
        page = page.replace(any_run.dataset_args["data_dir"], "DIR")  # where it lay is nobody's
        write_atomically(GALLERY / f"{name}.html", page.encode())
        link = f"; [the page]({name}.html)"
        command = f"fedinit run experiments/real_data/{name}.yaml --set dataset_args.data_dir=DIR"
    minutes = float((folder / _SECONDS).read_text()) / 60
    lines += ["", f"`{command}`: {minutes:.1f} minutes; [numbers]({name}.csv){link}", ""]
    return "\n".join(lines)


def _copy(name: str, finding: Finding) -> None:
    drawing = finding.drawing
    write_atomically(GALLERY / f"{name}.csv", drawing.csv.encode())
    if drawing.svg:
        write_atomically(GALLERY / f"{name}.svg", drawing.on_white.encode())


if __name__ == "__main__":
    typer.run(main)
