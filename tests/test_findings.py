"""What the studies compare: the same seeds on both sides, and settings that differ kept apart."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.studies import STUDIES, find
from fedinit.config import Run
from fedinit.figures import draw_figures
from fedinit.report import write_report
from fedinit.results import RunFolder, present_summary, read_summary
from fedinit.wording import MINUS
from tests.recorded import Lines, record
from tests.test_studies import HEAD, ends, finding, pretrained

BOTH = "initialization: [random, pretrained]"
Accuracy = Callable[[Run], float]


@pytest.mark.parametrize(
    ("study", "axis", "accuracy", "missing", "expected"),
    [
        (
            "convergence",
            "",
            lambda run: 0.6 if pretrained(run) else 0.3,
            lambda run: True,
            "is 60.0% from pre-trained against 30.0% from random weights (+30.0 points",
        ),
        (
            "client_gd",
            "client.optimizer: [sgd, gd], ",
            lambda run: 0.7 if run.client.optimizer == "sgd" else 0.6 if pretrained(run) else 0.5,
            lambda run: run.client.optimizer == "sgd",
            "over 2 seeds, from pre-trained against +20.0",
        ),
        (
            "iid_gap",
            "partition.kind: [iid, dirichlet], ",
            lambda run: 0.7 if run.partition.kind == "iid" else 0.6 if pretrained(run) else 0.5,
            lambda run: run.partition.kind == "iid",
            "over 2 seeds, from pre-trained against +20.0",
        ),
        (
            "local_epochs",
            "client.epochs: [1, 5], ",
            lambda run: 0.5 + (0.01 if pretrained(run) else -0.01) * run.client.epochs,
            lambda run: run.client.epochs == 1,
            f"over 2 seeds, from pre-trained weights against {MINUS}4.0",
        ),
        (
            "ranking",
            "server.optimizer: [sgd, adam], ",
            lambda run: (
                (0.7 if pretrained(run) else 0.3)
                + (0.1 if run.server.optimizer == "sgd" else 0.2 if pretrained(run) else -0.1)
            ),
            lambda run: run.server.optimizer == "sgd",
            "within 10.0 points of each other from pre-trained against 20.0",
        ),
        (
            "system_heterogeneity",
            "client.optimizer: [sgd, nova], server.optimizer: [adam], ",
            lambda run: 0.5 + 0.1 * (pretrained(run) == (run.client.optimizer == "sgd")),
            lambda run: run.client.optimizer == "nova",
            "sgd clients + adam (70.0%) from pre-trained and nova clients + adam (60.0%) from",
        ),
    ],
)
def test_arms_are_compared_on_the_seeds_that_they_share(
    tmp_path: Path, study: str, axis: str, accuracy: Accuracy, missing: Accuracy, expected: str
) -> None:
    """Seed 2 is 30 points better, and a run from random weights is missing: no pair has it.

    The best of heterogeneous methods are no pair: from pre-trained weights all seeds count.
    """

    def end(run: Run) -> float | None:
        if run.seed == 2 and not pretrained(run) and missing(run):
            return None
        return accuracy(run) + 0.3 * (run.seed == 2)

    found = finding(tmp_path, study, f"{{{axis}{BOTH}, seed: [0, 1, 2]}}", ends(end))
    assert expected in found.sentence
    assert found.sentence.endswith("which agrees.")


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ("ranking", "the 2 methods end within 20.0 points of each other from pre-trained against"),
        (
            "system_heterogeneity",
            "best is sgd clients + adam (80.0%) from pre-trained and sgd clients + adam (40.0%)",
        ),
    ],
)
def test_methods_that_lose_different_seeds_do_not_take_all_with_them(
    tmp_path: Path, study: str, expected: str
) -> None:
    """From random weights sgd has no seed 0, adam no seed 1: of seed 0 two methods are compared."""
    ends_of = {"sgd": 0.5, "momentum": 0.6, "adam": 0.8}

    def end(run: Run) -> float | None:
        server = run.server.optimizer
        if pretrained(run):
            return ends_of[server]
        return None if (server, run.seed) in (("sgd", 0), ("adam", 1)) else ends_of[server] / 2

    grid = f"{{server.optimizer: [sgd, momentum, adam], {BOTH}, seed: [0, 1]}}"
    assert expected in finding(tmp_path, study, grid, ends(end)).sentence


@pytest.mark.parametrize("study", list(STUDIES))
def test_a_study_of_runs_without_accuracy_says_so(tmp_path: Path, study: str) -> None:
    grid = f"{{client.epochs: [1, 2], {BOTH}}}"
    lines = [{"round": 0, "test_loss": 1.0}]
    folder = record(tmp_path, f"{HEAD}study: {study}\ngrid: {grid}", lambda _run: lines)
    found = find(folder, read_summary(folder))
    assert found is not None
    assert write_report(folder, found).exists()
    nothing = found.sentence.endswith("here there are no finished runs to compare.")
    assert nothing == (study != "initial_loss")


def test_settings_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    name = "the-same-long-name/final.safetensors"
    starts = {"random": 0.3, f"a/{name}": 0.9, f"b/{name}": 0.2}
    found = finding(
        tmp_path,
        "convergence",
        f"{{initialization: [{', '.join(starts)}]}}",
        ends(lambda run: starts[run.initialization.removeprefix(f"{tmp_path}/")]),
    )
    assert "is 90.0% from pre-trained" in found.sentence
    assert "is 20.0% from pre-trained" in found.sentence


@pytest.mark.parametrize(
    ("methods", "tasks"),
    [
        ("server: [{optimizer: sgd, lr: 1.0}, {optimizer: adam, lr: 0.01}]", 1),
        ("server.optimizer: [sgd, adam], server.lr: [1.0, 2.0]", 2),
    ],
)
def test_a_rate_that_goes_with_its_method_is_no_task(
    tmp_path: Path, methods: str, tasks: int
) -> None:
    accuracy = {("sgd", False): 0.2, ("adam", False): 0.6, ("sgd", True): 0.7, ("adam", True): 0.8}
    found = finding(
        tmp_path,
        "ranking",
        f"{{{methods}, {BOTH}}}",
        ends(lambda run: accuracy[run.server.optimizer, pretrained(run)]),
    )
    assert found.sentence.count("within 10.0 points of each other from pre-trained") == tasks


def test_each_way_to_be_non_iid_has_a_gap_of_its_own(tmp_path: Path) -> None:
    """Both are compared with the same IID clients, at 80%."""

    def end(run: Run) -> float:
        return 0.8 if run.partition.kind == "iid" else 0.7 if run.partition.alpha > 1 else 0.2

    skewed = f"{{partition.kind: [dirichlet], partition.alpha: [0.01, 10.0], {BOTH}}}"
    grid = f"[{{partition.kind: [iid], {BOTH}}}, {skewed}]"
    found = finding(tmp_path, "iid_gap", grid, ends(end))
    assert "on toy, dirichlet 0.01 IID clients end ahead of non-IID ones by +60.0" in found.sentence
    assert "on toy, dirichlet 10.0 IID clients end ahead of non-IID ones by +10.0" in found.sentence


def test_a_mean_is_of_the_same_runs_in_every_round(tmp_path: Path) -> None:
    """Seed 1 was far ahead until it failed after round 1."""

    def lines(run: Run) -> Lines:
        accuracy = 0.9 if run.seed else 0.2
        return [
            {"round": number, "test_loss": 1.0, "test_accuracy": accuracy}
            for number in range(2 if run.seed else 4)
        ]

    folder = record(tmp_path, f"{HEAD}grid: {{seed: [0, 1]}}", lines)
    (folder / "seed=1" / "final.safetensors").unlink()
    RunFolder(folder / "seed=1").fail("a client raised")
    (drawn, *_) = draw_figures(folder, present_summary(folder), ["test_accuracy"])
    shown = list(csv.DictReader(io.StringIO(drawn.csv)))
    assert [float(row["test_accuracy"]) for row in shown] == [0.2] * 4
