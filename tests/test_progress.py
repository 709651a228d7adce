"""What a run says of itself where no terminal shows a bar."""

import io
import time

import pytest
import yaml
from rich.console import Console
from torch import nn

from experiments.dry_run import cost_table
from experiments.progress import Progress
from fedinit.experiment_file import load_experiment


@pytest.mark.parametrize("before", [0, 40], ids=["from the start", "resumed"])
def test_the_time_left_is_that_of_rounds_after_the_warm_up(before, monkeypatch):
    """The first round takes 9 s, those after it 2 s: of 12, after 3 more, 9 are left, 18 s."""
    seconds = iter([0.0, 9.0, 11.0, 13.0] if not before else [9.0, 11.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    told = io.StringIO()
    with Progress(Console(file=told), runs=1).run("run", before + 12, "random weights") as report:
        for number in range(bool(before), 4):
            tested = number != 2
            report(
                {
                    "round": before + number,
                    "test_loss": 0.5 if tested else None,
                    "test_accuracy": 0.75 if tested else None,
                }
            )
    score = "accuracy 75.0%  loss 0.5"
    assert told.getvalue().splitlines() == [
        "[1/1] run",
        "  random weights",
        *([] if before else [f"  round 0/12  {score}"]),
        f"  round {before + 1}/{before + 12}  {score}",
        f"  round {before + 3}/{before + 12}  {score}  18 s left",
    ]


def test_a_table_that_goes_into_a_file_is_not_broken_at_80_columns(
    fedinit, experiment, monkeypatch
):
    monkeypatch.delenv("COLUMNS", raising=False)
    settings = {
        "dataset": "plugged_in:gaussians",
        "model": "plugged_in:dropout_classifier",
        "cohort": 2,
        "grid": {
            "dataset_args.per_client": [20],
            "strategy": ["flwr.serverapp.strategy:FedMedian"],
        },
    }
    result = fedinit("run", experiment(settings), "--dry-run")
    assert result.exit_code == 0, result.output
    run = "dataset_args.per_client=20,strategy=flwr.serverapp.strategy_FedMedian"
    assert f"\n{run} " in result.stdout


def tied(num_classes: int) -> nn.Module:
    """Two layers with one weight."""
    first, second = (nn.Linear(8, num_classes, bias=False) for _ in range(2))
    second.weight = first.weight
    return nn.Sequential(first, second)


@pytest.mark.parametrize(
    ("client", "stragglers", "passes"),
    [
        ({"optimizer": "sgd", "epochs": 5}, {}, 5),
        ({"optimizer": "gd", "epochs": 5}, {"fraction": 1.0, "epochs": [3, 3]}, 1),
        ({"optimizer": "mimelite", "epochs": 2}, {"fraction": 0.5, "epochs": [4, 6]}, 4.5),
    ],
)
def test_a_dry_run_counts_the_passes_and_a_tied_weight_once(client, stragglers, passes, tmp_path):
    """10 rounds of 2 clients of 20 and 25 rows; down and up 20 times 8 x 8 numbers of 4 bytes."""
    file = tmp_path / "tied.yaml"
    settings = {"dataset": "tests.plugged_in:gaussians", "model": "tests.test_progress:tied"}
    settings |= {"dataset_args": {"clients": 2, "classes": 8}, "cohort": 2, "rounds": 10}
    file.write_text(yaml.safe_dump(settings | {"client": client, "stragglers": stragglers}))
    told = io.StringIO()
    Console(file=told, width=200).print(cost_table(load_experiment(file)))
    (row,) = [line.split() for line in told.getvalue().splitlines() if line.startswith("tied")]
    assert row == ["tied", "10", "20", f"{450 * passes:,.0f}", f"{2e-9 * 20 * 4 * 64:.3g}"]
