"""What a run says of itself where no terminal shows a bar."""

import io
import time

import pytest
from rich.console import Console

from experiments.progress import Progress


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
