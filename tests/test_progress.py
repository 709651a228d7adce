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
