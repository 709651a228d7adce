"""A study's verdict asks each condition of its claim, and does not gloss over ties and signs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.studies import STUDIES
from fedinit.config import Run
from fedinit.results import RunFolder, read_summary
from fedinit.wording import MINUS
from tests.recorded import Lines, record
from tests.test_studies import HEAD, ends, finding, pretrained, rows

BOTH = "initialization: [random, pretrained]"
SERVERS = f"{{server.optimizer: [sgd, momentum, adam], {BOTH}}}"
CLIENTS = f"{{client.optimizer: [sgd, nova], server.optimizer: [adam], {BOTH}}}"


def curves(random: list[float], trained: list[float]) -> Callable[[Run], Lines]:
    """Test accuracies by round, from either initialization."""

    def lines(run: Run) -> Lines:
        return [
            {"round": number, "test_loss": 1.0, "test_accuracy": accuracy}
            for number, accuracy in enumerate(trained if pretrained(run) else random)
        ]

    return lines


def by_server(random: list[float], trained: list[float]) -> Callable[[Run], Lines | None]:
    names = ["sgd", "momentum", "adam"]
    found = {
        False: dict(zip(names, random, strict=True)),
        True: dict(zip(names, trained, strict=True)),
    }
    return ends(lambda run: found[pretrained(run)][run.server.optimizer])


def by_client(
    random: list[float], trained: list[float], second: str
) -> Callable[[Run], Lines | None]:
    """Ends of sgd clients, and of others."""

    def end(run: Run) -> float:
        return (trained if pretrained(run) else random)[run.client.optimizer == second]

    return ends(end)


def by_partition(random: list[float], trained: list[float]) -> Callable[[Run], Lines | None]:
    def end(run: Run) -> float:
        return (trained if pretrained(run) else random)[run.partition.kind != "iid"]

    return ends(end)


@pytest.mark.parametrize(
    ("study", "grid", "lines", "told"),
    [
        (  # higher, and not sooner: random's end in the last round
            "convergence",
            f"{{{BOTH}}}",
            curves([0.0, 0.1, 0.3], [0.0, 0.1, 0.5]),
            "by round 2 of 2, which",
        ),
        (  # higher, and later than random itself
            "convergence",
            f"{{{BOTH}}}",
            curves([0.0, 0.3, 0.2, 0.3], [0.0, 0.1, 0.4, 0.5]),
            "by round 2 of 3, from random weights by round 1, which",
        ),
        ("convergence", f"{{{BOTH}}}", curves([0.0, 0.1, 0.3], [0.0, 0.4, 0.2]), "round 1 of 2"),
        (  # another order, and farther apart
            "ranking",
            SERVERS,
            by_server([0.2, 0.3, 0.25], [0.8, 0.5, 0.6]),
            "within 30.0 points of each other from pre-trained against 10.0",
        ),
        (  # closer together, and no two in another order
            "ranking",
            SERVERS,
            by_server([0.1, 0.1, 0.3], [0.3, 0.31, 0.35]),
            "within 5.0 points of each other from pre-trained against 20.0",
        ),
        ("ranking", SERVERS, by_server([0.1] * 3, [0.1] * 3), "on toy Kendall's tau undefined"),
        (  # it hurts from either
            "local_epochs",
            f"{{client.epochs: [1, 5], {BOTH}}}",
            ends(lambda run: 0.6 - 0.01 * run.client.epochs),
            f"by {MINUS}4.0 points, from pre-trained weights against {MINUS}4.0 points",
        ),
        (
            "system_heterogeneity",
            CLIENTS,
            by_client([0.3, 0.4], [0.5, 0.6], "nova"),
            "is nova clients + adam (60.0%) from pre-trained and nova clients + adam (40.0%)",
        ),
        (  # nobody wins: as all guess
            "system_heterogeneity",
            CLIENTS.replace("sgd, nova", "nova, sgd"),
            by_client([0.1, 0.1], [0.6, 0.5], "nova"),
            "and nova clients + adam and sgd clients + adam (10.0%) from random weights",
        ),
        (
            "iid_gap",
            f"{{partition.kind: [iid, dirichlet], {BOTH}}}",
            by_partition([0.4, 0.3], [0.2, 0.7]),
            f"by {MINUS}50.0 points, from pre-trained against +10.0 points",
        ),
        (
            "client_gd",
            f"{{client.optimizer: [sgd, gd], {BOTH}}}",
            by_client([0.4, 0.3], [0.2, 0.7], "gd"),
            f"by {MINUS}50.0 points, from pre-trained against +10.0 points",
        ),
    ],
)
def test_all_but_one_condition_do_not_agree(
    tmp_path: Path, study: str, grid: str, lines: Callable[[Run], Lines | None], told: str
) -> None:
    found = finding(tmp_path, study, grid, lines)
    assert told in found.sentence
    assert found.sentence.endswith("which does not agree.")


def test_local_epochs_compares_those_that_finished_from_both(tmp_path: Path) -> None:
    """From random weights 20 epochs failed: the most that can be compared is 5."""

    def end(run: Run) -> float | None:
        if run.client.epochs == 20 and not pretrained(run):
            return None
        return 0.5 + (0.01 if pretrained(run) else -0.01) * run.client.epochs

    grid = f"{{client.epochs: [1, 5, 20], {BOTH}}}"
    found = finding(tmp_path, "local_epochs", grid, ends(end))
    assert (
        "going from 1 to 5 local epochs changes the final test accuracy by +4.0" in found.sentence
    )
    assert found.sentence.endswith("which agrees.")


def test_eigenvalues_of_either_sign_do_not_cancel(tmp_path: Path) -> None:
    """4 and -7: 5.5, and a deviation of 3 / sqrt(2). The largest of all, 4 and -1, have 1.5."""

    def lines(run: Run) -> Lines:
        absolute = 2.0 if pretrained(run) else -7.0 if run.seed else 4.0
        return [
            {
                "round": 0,
                "test_loss": 1.0,
                "hessian_algebraic": 4.0 - 5.0 * run.seed,
                "hessian_absolute": absolute,
                "hessian_algebraic_residual": 1e-4,
                "hessian_absolute_residual": 1e-4,
                "hessian_products": 20,
            }
        ]

    found = finding(tmp_path, "hessian", f"{{{BOTH}, seed: [0, 1]}}", lines)
    assert float(rows(found)[0]["hessian_absolute"]) == 5.5
    assert float(rows(found)[0]["hessian_algebraic"]) == 1.5
    assert float(rows(found)[0]["hessian_absolute_standard_deviation"]) == pytest.approx(3 / 2**0.5)


def test_alignment_asks_all_three_measures_of_the_seeds_in_common(tmp_path: Path) -> None:
    """Lower diversity, a shorter way, but not better aligned; seed 1 has no run from random."""

    def lines(run: Run) -> Lines | None:
        if run.seed and not pretrained(run):
            return None
        trained = {
            "gradient_diversity": 0.5 if pretrained(run) else 1.0,
            "mean_pairwise_cosine": 0.9 if run.seed else 0.1,
        }
        return [
            {"round": number, "test_loss": 1.0, "test_accuracy": 0.5} | (trained if number else {})
            for number in range(2)
        ]

    grid = f"{{{BOTH}, seed: [0, 1]}}"
    folder = record(tmp_path, f"{HEAD}study: alignment\ngrid: {grid}", lines)
    for start, first in (("random", 5.0), ("pretrained", 3.0)):
        run = RunFolder(folder / f"initialization={start},seed=0")
        run.keep(0, torch.tensor([first]))
        run.measure_distances(torch.tensor([0.0]))
    found = STUDIES["alignment"](folder, read_summary(folder))
    assert "mean gradient diversity 0.500 against 1.00" in found.sentence
    assert "mean pairwise cosine 0.100 against 0.100" in found.sentence
    assert "distance of the initial to the final x 3.00 against 5.00" in found.sentence
    assert found.sentence.endswith("which does not agree.")
    assert {row["seeds"] for row in rows(found)} == {"1"}
