"""Each study's sentence, numbers and figure, from results that hold known numbers."""

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from experiments.cli import EXPERIMENTS
from experiments.dry_run import cost_table
from experiments.studies import STUDIES, find
from fedinit.config import Run, get
from fedinit.errors import RequestError
from fedinit.experiment_file import load_experiment, matches, read_settings
from fedinit.report import Finding, write_report
from fedinit.results import RunFolder, read_summary
from fedinit.statistics import kendall_tau, paired_difference
from tests.recorded import Lines, record

UNTRAINED = ("hessian", "initial_loss")  # measured at round 0
HEAD = "name: s\ndataset: toy\nmodel: tiny\n"


def finding(tmp_path: Path, study: str, grid: str, lines: Callable[[Run], Lines | None]) -> Finding:
    folder = record(tmp_path, f"{HEAD}study: {study}\ngrid: {grid}", lines)
    found = find(folder, read_summary(folder))
    assert found is not None
    page = write_report(folder, found).read_text(encoding="utf-8")
    assert found.sentence.replace("'", "&#39;") in page
    assert (folder / "figures" / f"{study}.csv").read_text() == found.drawing.csv
    if found.drawing.svg:
        root = ElementTree.fromstring(found.drawing.svg)  # noqa: S314
        assert root.attrib["aria-label"]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    return found


def ends(accuracy: Callable[[Run], float | None]) -> Callable[[Run], Lines | None]:
    """Rounds 0, 1 and 2, with the accuracy reached in round 2, half of it in round 1."""

    def lines(run: Run) -> Lines | None:
        end = accuracy(run)
        if end is None:
            return None
        return [
            {"round": number, "test_loss": 2.0 - number / 2, "test_accuracy": end * number / 2}
            for number in range(3)
        ]

    return lines


def rows(found: Finding) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(found.drawing.csv)))


def pretrained(run: Run) -> bool:
    return run.initialization == "pretrained"


def test_statistics_by_hand() -> None:
    """Differences 1, 3: mean 2, s = sqrt(2), t(0.975; 1 df) = 12.7062: 2 +- 12.7062.

    The orders (1, 2, 3) and (1, 3, 2) agree in 2 pairs of 3: tau = (2 - 1) / 3.
    """
    difference = paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {0: 2.0, 1: 5.0, 8: 0.0})
    assert difference is not None
    assert (difference.mean, difference.pairs) == (2.0, 2)
    assert difference.high - 2 == pytest.approx(12.7062, abs=1e-4)
    assert 2 - difference.low == pytest.approx(12.7062, abs=1e-4)
    single = paired_difference({0: 1.0}, {0: 2.5})
    assert single is not None
    assert single.mean == 1.5
    assert math.isnan(single.low)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_convergence_compares_ends_and_when_the_other_end_is_passed(tmp_path: Path) -> None:
    """Pre-trained ends at 80%, is at 40% in round 1, where random's end is 30%: round 1 of 2.

    Seeds differ by 2 points in both arms: the paired difference is 50 points with no spread.
    """
    found = finding(
        tmp_path,
        "convergence",
        "{initialization: [random, pretrained], seed: [0, 1]}",
        ends(lambda run: (0.8 if pretrained(run) else 0.3) + 0.02 * run.seed),
    )
    assert found.sentence == (
        "The study finds that training from pre-trained weights is faster and ends higher; here, "
        "on toy the final test accuracy is 81.0% from pre-trained against 31.0% from random "
        "weights (+50.0 points, 95% interval +50.0 points to +50.0 points over 2 seeds), and "
        "random's end is reached by round 1 of 2, which agrees."
    )
    last = [row for row in rows(found) if row["round"] == "2"]
    assert [float(row["test_accuracy"]) for row in last] == pytest.approx([0.31, 0.81])
    assert [float(row["standard_deviation"]) for row in last] == pytest.approx([0.02 / 2**0.5] * 2)


def test_convergence_that_does_not_agree_says_so(tmp_path: Path) -> None:
    found = finding(
        tmp_path,
        "convergence",
        "{initialization: [random, pretrained]}",
        ends(lambda run: 0.2 if pretrained(run) else 0.3),
    )
    assert "random's end is never reached, which does not agree." in found.sentence


@pytest.mark.parametrize("pretrained_ends", [[0.7, 0.8, 0.75], [0.5, 0.6, 0.9]])
def test_ranking_reports_tau_and_spread(tmp_path: Path, pretrained_ends: list[float]) -> None:
    """Random: 0.2 < 0.4 < 0.6; pre-trained orders (1, 3, 2): tau 1/3, spread 10 of 40 points.

    The second case keeps the order, tau 1, with a spread of 40 points.
    """
    servers = ["sgd", "momentum", "adam"]
    random = dict(zip(servers, [0.2, 0.4, 0.6], strict=True))
    trained = dict(zip(servers, pretrained_ends, strict=True))
    found = finding(
        tmp_path,
        "ranking",
        f"{{server.optimizer: {servers}, initialization: [random, pretrained]}}",
        ends(lambda run: (trained if pretrained(run) else random)[run.server.optimizer]),
    )
    if pretrained_ends[0] == 0.7:
        assert "Kendall's tau 0.33 between the two orders" in found.sentence
        assert "within 10.0 points of each other from pre-trained against 40.0" in found.sentence
        assert found.sentence.endswith("which agrees.")
    else:
        assert "Kendall's tau 1.00" in found.sentence
        assert found.sentence.endswith("which does not agree.")
    assert {(row["server.optimizer"], row["initialization"]) for row in rows(found)} == {
        (server, start) for server in servers for start in ("random", "pretrained")
    }
    for server in servers:
        assert found.drawing.svg.count(f">sgd + {server}<") == 2  # a label on either axis


@pytest.mark.parametrize(("loss", "agrees"), [(0.02, True), (-0.02, False)])
def test_local_epochs_compares_fewest_and_most(tmp_path: Path, loss: float, agrees: bool) -> None:
    """Random loses or gains 2 points for each epoch more; pre-trained gains 1: 4 epochs more."""
    found = finding(
        tmp_path,
        "local_epochs",
        "{client.epochs: [1, 2, 5], initialization: [random, pretrained]}",
        ends(
            lambda run: (
                0.5 + 0.01 * run.client.epochs
                if pretrained(run)
                else 0.4 - loss * run.client.epochs
            )
        ),
    )
    assert "going from 1 to 5 local epochs changes the final test accuracy by +4.0" in (
        found.sentence
    )
    assert found.sentence.endswith("which agrees." if agrees else "which does not agree.")
    assert [row["client.epochs"] for row in rows(found)] == ["1", "2", "5"] * 2


def test_iid_gap_compares_gaps(tmp_path: Path) -> None:
    """Gaps: random 60 - 20 = 40 points, pre-trained 80 - 75 = 5."""
    values = {("iid", False): 0.6, ("dirichlet", False): 0.2}
    values |= {("iid", True): 0.8, ("dirichlet", True): 0.75}
    found = finding(
        tmp_path,
        "iid_gap",
        "{partition.kind: [iid, dirichlet], initialization: [random, pretrained]}",
        ends(lambda run: values[run.partition.kind, pretrained(run)]),
    )
    assert "by +5.0 points, from pre-trained against +40.0 points, from random" in found.sentence
    assert found.sentence.endswith("which agrees.")


@pytest.mark.parametrize("best", ["nova", "sgd"])
def test_system_heterogeneity_names_the_best_methods(tmp_path: Path, best: str) -> None:
    def accuracy(run: Run) -> float:
        method = (run.client.optimizer, run.server.optimizer)
        if pretrained(run):
            return 0.9 if method == ("sgd", "adam") else 0.5
        return 0.6 if method == (best, "sgd") else 0.3

    found = finding(
        tmp_path,
        "system_heterogeneity",
        "{client.optimizer: [sgd, nova], server.optimizer: [sgd, adam], "
        "initialization: [random, pretrained]}",
        ends(accuracy),
    )
    assert (
        f"the best is sgd clients + adam (90.0%) from pre-trained and {best} clients + sgd (60.0%)"
    ) in found.sentence
    assert found.sentence.endswith("which agrees." if best == "nova" else "which does not agree.")


def test_alignment_has_seven_panels_and_compares_three_measures(tmp_path: Path) -> None:
    """Diversity 0.5 against 1 and cosine 0.4 against 0.1 in each round; distances 3 against 5."""

    def lines(run: Run) -> Lines:
        trained = {
            "train_loss": 1.0,
            "train_accuracy": 0.5,
            "gradient_diversity": 0.5 if pretrained(run) else 1.0,
            "mean_pairwise_cosine": 0.4 if pretrained(run) else 0.1,
            "cosine_with_previous": 0.2,
        }
        return [
            {"round": number, "test_loss": 1.0, "test_accuracy": 0.5} | (trained if number else {})
            for number in range(3)
        ]

    grid = "{initialization: [random, pretrained]}"
    folder = record(tmp_path, f"{HEAD}study: alignment\ngrid: {grid}", lines)
    for start, first in (("random", 5.0), ("pretrained", 3.0)):
        run = RunFolder(folder / f"initialization={start}")
        run.keep(0, torch.tensor([1.0, 1.0 + first]))
        run.keep(2, torch.tensor([1.0, 1.0]))
        run.measure_distances(torch.tensor([1.0, 1.0]))
        assert run.distances == {0: first, 2: 0.0}
    found = STUDIES["alignment"](folder, read_summary(folder))
    assert "mean gradient diversity 0.500 against 1.00" in found.sentence
    assert "mean pairwise cosine 0.400 against 0.100" in found.sentence
    assert "distance of the initial to the final x 3.00 against 5.00" in found.sentence
    assert found.sentence.endswith("which agrees.")
    for title in (
        "train loss",
        "train accuracy",
        "test loss",
        "test accuracy",
        "gradient diversity",
        "cosine similarity",
        "L2 distance to final x",
    ):
        assert f">{title}</text>" in found.drawing.svg


def test_client_gd_compares_leads(tmp_path: Path) -> None:
    """sgd leads gd by 2 points from pre-trained, by 30 from random."""
    values = {("sgd", False): 0.5, ("gd", False): 0.2, ("sgd", True): 0.8, ("gd", True): 0.78}
    found = finding(
        tmp_path,
        "client_gd",
        "{client.optimizer: [sgd, gd], initialization: [random, pretrained]}",
        ends(lambda run: values[run.client.optimizer, pretrained(run)]),
    )
    assert "by +2.0 points, from pre-trained against +30.0 points, from random" in found.sentence
    assert found.sentence.endswith("which agrees.")


def test_hessian_is_a_table_of_means_and_deviations(tmp_path: Path) -> None:
    """Random 9 and 11: 10 +- sqrt(2); pre-trained 2 and 4: 3 +- sqrt(2)."""

    def lines(run: Run) -> Lines:
        top = (3.0 if pretrained(run) else 10.0) + 2 * run.seed - 1
        return [
            {
                "round": 0,
                "test_loss": 1.0,
                "hessian_algebraic": top,
                "hessian_absolute": -2 * top,
                "hessian_algebraic_residual": 1e-4,
                "hessian_absolute_residual": 1e-4,
                "hessian_products": 20,
            }
        ]

    grid = "{initialization: [random, pretrained], seed: [0, 1]}"
    found = finding(tmp_path, "hessian", grid, lines)
    assert "it is 3.00 from pre-trained against 10.0 from random weights" in found.sentence
    assert found.table[1][:4] == ["toy", "random", "10.0 ± 1.41", "−20.0 ± 2.83"]  # noqa: RUF001
    assert float(rows(found)[0]["hessian_algebraic_standard_deviation"]) == pytest.approx(2**0.5)


@pytest.mark.parametrize(("higher", "agrees"), [(True, True), (False, False)])
def test_initial_loss_is_a_claim_about_all_tasks(
    tmp_path: Path, higher: bool, agrees: bool
) -> None:
    def lines(run: Run) -> Lines:
        worse = higher and run.dataset == "b"
        loss = 2.0 if not pretrained(run) else 3.0 if worse else 1.0
        return [{"round": 0, "test_loss": loss, "test_accuracy": 0.1}]

    grid = "{dataset: [a, b], initialization: [random, pretrained]}"
    found = finding(tmp_path, "initial_loss", grid, lines)
    assert "on a it is 1.00 from pre-trained against 2.00 from random" in found.sentence
    assert found.sentence.endswith("which agrees." if agrees else "which does not agree.")


@pytest.mark.parametrize("study", list(STUDIES))
def test_a_study_without_finished_runs_says_so(tmp_path: Path, study: str) -> None:
    folder = record(
        tmp_path,
        f"{HEAD}study: {study}\ngrid: {{initialization: [random, pretrained]}}",
        ends(none),
    )
    found = find(folder, read_summary(folder))
    assert found is not None
    assert found.sentence.endswith("here there are no finished runs to compare.")
    write_report(folder, found)


def none(_run: Run) -> None:
    return None


def test_other_varied_settings_are_tasks_of_their_own(tmp_path: Path) -> None:
    found = finding(
        tmp_path,
        "convergence",
        "{cohort: [1, 2], initialization: [random, pretrained]}",
        ends(lambda run: 0.8 if pretrained(run) else 0.3),
    )
    assert "on cohort = 1 the" in found.sentence
    assert "on cohort = 2 the" in found.sentence


def test_a_proxy_stands_where_published_weights_do(tmp_path: Path) -> None:
    """With both, each is compared with random weights on its own."""
    by_start = {"random": 0.3, "proxy": 0.7, "pretrained": 0.8}
    for starts in (["random", "proxy"], ["random", "proxy", "pretrained"]):
        (parent := tmp_path / str(len(starts))).mkdir()
        found = finding(
            parent,
            "convergence",
            f"{{initialization: [{', '.join(starts)}]}}",
            ends(lambda run: by_start[run.initialization]),
        )
        for start in starts[1:]:
            task = f"toy from {start}" if len(starts) > 2 else "toy"
            end = f"{by_start[start]:.1%}"
            assert f"on {task} the final test accuracy is {end} from pre-trained" in found.sentence
        assert found.sentence.count("which agrees") == len(starts) - 1


def test_own_weights_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    """Beside it they need no folder, wherever it lies; elsewhere the path is as it is."""
    starts = {"random": 0.3, "a.safetensors": 0.7, "weights/b.safetensors": 0.8}
    (folder := tmp_path / ("long" * 10)).mkdir()
    found = finding(
        folder,
        "convergence",
        f"{{initialization: [{', '.join(starts)}, /c.safetensors]}}",
        ends(lambda run: starts.get(run.initialization.removeprefix(f"{folder}/"), 0.9)),
    )
    for start in (*list(starts)[1:], "/c.safetensors"):
        end = f"{starts.get(start, 0.9):.1%}"
        assert f"on toy from {start} the final test accuracy is {end}" in found.sentence


@pytest.mark.parametrize("study", list(STUDIES))
@pytest.mark.parametrize("preset", ["embedded", "paper"])
def test_every_study_has_its_two_presets(study: str, preset: str) -> None:
    """Both initializations, the seeds that the study asks for, and a dry run that lists them."""
    experiment = load_experiment(EXPERIMENTS / f"{study}.yaml", preset=preset)
    assert experiment.study == study
    runs = experiment.runs.values()
    for model in {run.model for run in runs}:
        trained = "proxy" if model == "charlm" else "pretrained"  # nobody publishes charlm's
        starts = {run.initialization for run in runs if run.model == model}
        assert starts == {"random", trained}
    seeds = {run.seed for run in runs}
    assert len(seeds) >= 2 if preset == "embedded" else seeds == {0, 1, 2}
    cost_table(experiment)
    for label, run in experiment.runs.items():
        for setting in label.split(","):
            key, _, value = setting.partition("=")
            assert str(get(run, key)) == value


def test_an_unknown_study_or_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'ranking'"):
        find(tmp_path, {"study": "rankin"})
    with pytest.raises(RequestError, match=r"--preset.*embedded, paper"):
        load_experiment(EXPERIMENTS / "ranking.yaml", preset="small")


@pytest.mark.parametrize("study", [name for name in STUDIES if name not in UNTRAINED])
def test_every_embedded_arm_has_tuned_rates(study: str) -> None:
    """One rule of rates.yaml is about the arm, and the run has what it sets."""
    rules = read_settings(EXPERIMENTS / "rules" / "rates.yaml")["when"]
    for label, run in load_experiment(EXPERIMENTS / f"{study}.yaml").runs.items():
        (rule,) = [each for each in rules if matches(run, each)]
        assert rule["set"], label
        assert all(get(run, key) == value for key, value in rule["set"].items()), label
