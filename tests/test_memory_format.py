"""channels_last changes how convolutions lie in memory, and nothing else."""

import pytest

from fedinit.results import RunFolder
from tests.test_simulation import difference, numbers

IMAGES = {
    "dataset": "plugged_in:noise_images",
    "model": "cnn",
    "client": {"lr": 0.05, "batch_size": 4},
    "cohort": 4,
    "rounds": 2,
    "workers": 2,
}


def test_both_formats_train_the_same_weights(finals):
    """float32 sums in another order: the same to 1e-5, for whatever reads or writes weights."""
    clients = ["sgd", "gd", "proximal", "nova", "mimelite"]
    settings = IMAGES | {
        "client": {**IMAGES["client"], "mu": 0.1, "momentum": 0.5},
        "server": {"optimizer": "momentum", "lr": 0.1},
        "grid": {"client.optimizer": clients, "memory_format": ["contiguous", "channels_last"]},
    }
    runs = finals(settings)
    for client in clients:
        one, other = (
            runs[f"client.optimizer={client},memory_format={each}"]
            for each in ("contiguous", "channels_last")
        )
        assert difference(one, other) < 1e-5
        for ours, theirs in zip(numbers(one), numbers(other), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model": "plugged_in:Viewing"}, "contiguous"),
        ({"model": "plugged_in:SlowUnless", "model_args": {"fast": "channels_last"}}, None),
        ({"model": "plugged_in:SlowUnless", "model_args": {"fast": "contiguous_format"}}, None),
    ],
)
def test_auto_takes_the_faster_format_that_the_model_can_do_with(model, expected, finals):
    (run,) = finals(IMAGES | model).values()
    expected = expected or model["model_args"]["fast"].removesuffix("_format")
    assert RunFolder(run).run.memory_format == expected


def test_a_resumed_run_keeps_its_format(fedinit, experiment, ray_started, tmp_path):
    """`auto` on resuming means what the run began with; another format is another run."""
    file, out = experiment(IMAGES | {"memory_format": "channels_last"}), tmp_path / "out"
    assert fedinit("run", file, "--out", out).exit_code == 0
    folder = RunFolder(out / "experiment")
    (folder.path / "final.safetensors").unlink()
    again = ("run", file, "--out", out, "--resume", "--set")
    refused = fedinit(*again, "memory_format=contiguous")
    assert (refused.exit_code, "other settings" in refused.stderr) == (2, True)
    assert fedinit(*again, "memory_format=auto").exit_code == 0
    assert (folder.status, folder.run.memory_format) == ("done", "channels_last")
