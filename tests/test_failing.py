"""Clients that raise and runs that diverge: named, counted, and kept out of every mean."""

import csv
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.cli import app
from experiments.studies import find
from fedinit.experiment_file import load_experiment
from fedinit.report import compare_initializations, write_report
from fedinit.results import RunFolder, read_summary, summarize

# Three clients with 1, 3 and 2 equal rows; from x = 0 one step of rate 0.1 goes to 0.1 a b.
POINTS = {
    "dataset": "plugged_in:quadratics",
    "dataset_args": {
        "curvature": [[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]],
        "optimum": [[1.0, -1.0], [2.0, -2.0], [7.0, 7.0]],
        "examples": [1, 3, 2],
        "test_optimum": [0.0, 0.0],
    },
    "model": "plugged_in:FailingPoint",
    "model_args": {"victims": [5.0]},
    "loss": "plugged_in:half_squared_error",
    "client": {"lr": 0.1, "batch_size": 8},
    "cohort": 3,
    "rounds": 2,
    "workers": 2,
    "evaluate_every": 2,
}
SURVIVORS = (1 * 0.1 * 1 * 1 + 3 * 0.1 * 3 * 2) / 4  # 0.475 after a round
FLOWERS = "flwr.serverapp.strategy:FedAvg"


@pytest.fixture(scope="module")
def results(ray_started, tmp_path_factory):
    """The folder of one sweep with every way to fail, and what was said."""
    folder = tmp_path_factory.mktemp("failing")
    for own in Path(__file__).parent.glob("plugged_in*.py"):
        shutil.copy(own, folder)
    skip = {"on_client_error": ["skip"], "rounds": [1]}
    file = folder / "failing.yaml"
    grid = [
        {"on_client_error": ["abort"]},
        {**skip, "reduce": ["worker", "client"]},
        {**skip, "strategy": [FLOWERS], "reduce": ["worker", "client"]},
        {**skip, "model_args": [{"victims": [1.0, 3.0, 5.0]}], "strategy": ["fedopt", FLOWERS]},
        {"model": ["plugged_in:Point"], "model_args": [{}], "server.lr": [1.7e308]},
        {"model": ["plugged_in:Point"], "model_args": [{}], "client.lr": [5e152]},
        {"model": ["plugged_in:Point"], "model_args": [{}], "server.lr": [1.0]},
        {
            "model": ["plugged_in:Point"],
            "model_args": [{}],
            "strategy": ["plugged_in_strategies:Raising", "plugged_in_strategies:Silent"],
        },
    ]
    file.write_text(yaml.safe_dump(POINTS | {"grid": grid}))
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(folder / "out")])
    return folder / "out", result


def of(out, **settings):
    """The summary's rows with these settings."""
    rows = read_summary(out)["runs"]
    return [row for row in rows if all(row[key] == each for key, each in settings.items())]


def test_a_failed_client_ends_its_run_named_and_the_sweep_goes_on(results):
    out, result = results
    assert result.exit_code == 1
    (row,) = of(out, on_client_error="abort", model="plugged_in:FailingPoint")
    assert row["status"] == "failed"
    assert "client 2 'client 2' failed to train in round 1: ValueError: out of luck" in row["error"]
    assert f"failed: {row['run']}: {row['error']}" in result.output.replace("\n", " ")


@pytest.mark.parametrize("reduce", ["worker", "client"])
@pytest.mark.parametrize("strategy", ["fedopt", FLOWERS])
def test_skipped_clients_are_counted_and_the_survivors_averaged(strategy, reduce, results):
    """x = (1 * 0.1 + 3 * 0.6) / 4 and its negative."""
    out, _ = results
    (row,) = of(out, strategy=strategy, reduce=reduce, on_client_error="skip")
    assert (row["status"], row["failed_clients"]) == ("done", 1)
    folder = RunFolder(out / row["run"])
    line = folder.rounds[1]
    assert (line["cohort_size"], line["examples"], line["failed_clients"]) == (2, 4, 1)
    assert "client 2 'client 2' failed to train in round 1" in line["client_error"]
    x = load_file(folder.path / "final.safetensors")["x"]
    assert x.tolist() == pytest.approx([SURVIVORS, -SURVIVORS])


@pytest.mark.parametrize("strategy", ["fedopt", FLOWERS])
def test_a_round_without_survivors_ends_the_run(strategy, results):
    out, _ = results
    (row,) = of(out, strategy=strategy, reduce="auto", on_client_error="skip")
    assert row["status"] == "failed"
    assert "round 1: no client survived" in row["error"]
    assert "ValueError: out of luck" in row["error"]
    assert row["error"].count(".py:") == 1  # the client's line, and no line of ours


def test_weights_that_are_not_finite_end_the_run_at_once(results):
    """D = -(1 * 0.1 + 3 * 0.6 + 2 * 3.5) / 6 is finite, 1.7e308 D is not; nothing is tested."""
    out, _ = results
    (row,) = of(out, **{"server.lr": 1.7e308})
    assert (row["status"], row["diverged_in_round"]) == ("diverged", 1)
    assert row["error"] == "weights are not finite in round 1"
    assert RunFolder(out / row["run"]).rounds[-1]["diverged"] == "weights are"


def test_a_loss_that_is_not_finite_ends_the_run_at_once(results):
    """x = 14.8 lr = 7.4e153, whose square is finite; two rows' 5 x^2 are not, in round 2."""
    out, _ = results
    (row,) = of(out, **{"client.lr": 5e152})
    assert (row["status"], row["diverged_in_round"]) == ("diverged", 2)
    assert row["error"] == "train_loss is not finite in round 2"


def test_a_strategy_that_raises_is_named_with_its_line(results):
    """It ends in round 2: what was tested before is no final result."""
    out, _ = results
    (row,) = of(out, strategy="plugged_in_strategies:Raising")
    assert row["status"] == "failed"
    lines = (out.parent / "plugged_in_strategies.py").read_text().splitlines()
    number = 1 + next(at for at, line in enumerate(lines) if "no second round" in line)
    assert row["error"].startswith("KeyError: 'no second round' (")
    assert row["error"].endswith(f"plugged_in_strategies.py:{number})")
    assert row["initial_test_loss"] is not None
    assert row["final_test_loss"] is None


def test_a_strategy_that_returns_no_weights_is_not_done(results):
    out, _ = results
    (row,) = of(out, strategy="plugged_in_strategies:Silent")
    assert row["status"] == "failed"
    told = "strategy 'plugged_in_strategies:Silent' returned no weights in any of 2 rounds"
    assert row["error"] == f"RuntimeError: {told}"
    assert not (out / row["run"] / "final.safetensors").exists()


def test_the_page_says_what_was_left_out_and_counts_failed_clients(results):
    out, result = results
    page = (out / "report.html").read_text()
    assert "2 runs diverged and are left out of every mean and figure" in page
    assert "failed clients" in page
    assert "2 diverged" in page
    (row,) = of(out, **{"server.lr": 1.7e308})
    assert f"diverged: {row['run']}: weights are not finite" in result.output


def test_resume_runs_no_diverged_run_again(results, fedinit):
    out, _ = results
    rows = {row["run"]: row["status"] for row in read_summary(out)["runs"]}
    ended = [out / run for run, status in rows.items() if status in ("done", "diverged")]
    before = [(path / "rounds.jsonl").stat().st_mtime_ns for path in ended]
    again = fedinit("run", out.parent / "failing.yaml", "--out", out, "--resume")
    assert again.exit_code == 1
    assert [(path / "rounds.jsonl").stat().st_mtime_ns for path in ended] == before
    assert {row["run"]: row["status"] for row in read_summary(out)["runs"]} == rows


def test_a_diverged_run_is_in_no_mean(tmp_path):
    """Of two seeds from random one diverged: the mean is the other's 0.5, not (0.5 + 0.1) / 2."""
    file = tmp_path / "study.yaml"
    file.write_text(
        "study: convergence\ndataset: toy\nmodel: tiny\n"
        "grid: {initialization: [random, pretrained], seed: [0, 1]}"
    )
    experiment = load_experiment(file)
    for label, run in experiment.runs.items():
        folder = RunFolder(tmp_path / "out" / label)
        folder.begin(run, {})
        diverges = run.initialization == "random" and run.seed == 1
        for number, accuracy in enumerate((0.1, 0.1) if diverges else (0.1, 0.5)):
            measured = {"test_loss": 1.0, "test_accuracy": accuracy, "wall_seconds": 1.0}
            folder.append({"round": number, **measured})
        if diverges:
            folder.diverge(1, "test_loss is not finite in round 1")
        else:
            folder.finish({})
    summary = summarize(tmp_path / "out", experiment)
    said = "1 run diverged and is left out of every mean and figure: "
    said += "initialization=random,seed=1 in round 1."
    finding = find(tmp_path / "out", summary)
    assert finding is not None
    assert finding.sentence.endswith(said)
    assert "50.0% from pre-trained against 50.0% from random" in finding.sentence
    comparison = compare_initializations(summary)
    assert comparison is not None
    assert [row[0] for row in comparison.rows] == ["50.0%"]
    assert said in write_report(tmp_path / "out", finding).read_text()
    with (tmp_path / "out" / "figures" / "convergence.csv").open() as text:
        ends = [row for row in csv.DictReader(text) if row["round"] == "1"]
    assert [(float(row["test_accuracy"]), row["seeds"]) for row in ends] == [(0.5, "1"), (0.5, "2")]
