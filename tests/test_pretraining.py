"""Proxy weights: what they are, where they lie, and what a run takes from them."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedinit.config import Run
from fedinit.initialization import metadata
from fedinit.pretraining import proxy_path
from fedinit.registry import source_of
from fedinit.results import RunFolder

# One row: the loss is 1/2 a (x - b)^2, from x = 0. The federated data have their optimum elsewhere.
A, B, LR, MOMENTUM, EPOCHS = 2.0, 3.0, 0.1, 0.5, 6
POINT = {
    "dataset": "plugged_in:quadratics",
    "dataset_args": {"curvature": [[1.0]], "optimum": [[7.0]], "examples": [1]},
    "model": "plugged_in:Point",
    "model_args": {"size": 1},
    "loss": "plugged_in:half_squared_error",
    "initialization": "proxy",
    "proxy": {
        "dataset": "plugged_in:quadratics",
        "dataset_args": {"curvature": [[A]], "optimum": [[B]], "examples": [1]},
        "lr": LR,
        "momentum": MOMENTUM,
        "epochs": EPOCHS,
    },
    "rounds": 1,
    "cohort": 1,
    "workers": 1,
}
CLASSIFIER = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:dropout_classifier",
    "proxy": {"dataset": "plugged_in:gaussians", "epochs": 20, "batch_size": 8, "lr": 0.2},
    "cohort": 2,
    "rounds": 1,
    "workers": 1,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedinit" / "proxy"


def by_hand(schedule: str) -> float:
    """v <- m v + a (x - b), x <- x - lr_t v; cosine: lr_t = lr (1 + cos(pi t / T)) / 2."""
    x = velocity = 0.0
    for step in range(EPOCHS):
        rate = LR * (1 + math.cos(math.pi * step / EPOCHS)) / 2 if schedule == "cosine" else LR
        velocity = MOMENTUM * velocity + A * (x - B)
        x -= rate * velocity
    return x


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_starts_where_its_proxy_ends(schedule, finals, cache):
    """Round 0's test loss, at the federated optimum 7, is 1/2 (x - 7)^2."""
    settings = POINT | {"proxy": {**POINT["proxy"], "schedule": schedule}}
    (run,) = finals(settings).values()
    x = by_hand(schedule)
    assert RunFolder(run).rounds[0]["test_loss"] == pytest.approx((x - 7) ** 2 / 2, rel=1e-9)
    (path,) = cache.iterdir()
    assert load_file(path)["x"].item() == pytest.approx(x, rel=1e-9)
    epochs = metadata(path)["epochs"]
    assert [each["epoch"] for each in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[0]["train_loss"] == pytest.approx(A * B**2 / 2)
    assert epochs[-1]["test_loss"] == pytest.approx(A * (x - B) ** 2 / 2)
    assert RunFolder(run).initialization["about"] == metadata(path)


def test_what_is_trained_once_is_found_again(fedinit, experiment, ray_started, cache, tmp_path):
    """`pretrain` and `run` share the file; another setting is another file, a run's seed is not."""
    file = experiment(POINT | {"grid": {"seed": [0, 1], "proxy.lr": [0.1, 0.2]}})
    made = fedinit("pretrain", file)
    assert made.exit_code == 0, made.output
    paths = sorted(cache.iterdir())
    assert sorted(made.stdout.split("\n")[-3:-1]) == [str(path) for path in paths]
    kept = [path.stat().st_mtime_ns for path in paths]
    assert fedinit("run", file, "--out", tmp_path / "out").exit_code == 0
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == kept


@pytest.mark.parametrize(
    ("dataset", "fresh"),
    [("plugged_in:gaussians", []), ("plugged_in:other_gaussians", ["3.weight", "3.bias"])],
)
def test_a_trained_head_fits_only_the_labels_it_was_trained_on(dataset, fresh, finals, cache):
    """Three corners, 60 test points: trained on them the first round is better than chance."""
    settings = CLASSIFIER | {"dataset": dataset, "initialization": "proxy"}
    (run,) = finals(settings).values()
    record = RunFolder(run).initialization
    assert record["fresh"] == fresh
    assert (RunFolder(run).rounds[0]["test_accuracy"] > 0.9) == (not fresh)
    (path,) = cache.iterdir()
    assert metadata(path)["labels"] == "plugged_in:gaussians"
    assert metadata(path)["examples"] == sum(20 + 5 * client for client in range(6))


def test_of_ones_own_data_the_labels_depend_on_the_arguments(finals, cache):
    settings = CLASSIFIER | {"initialization": "proxy", "dataset_args": {"clients": 5}}
    (run,) = finals(settings).values()
    assert RunFolder(run).initialization["fresh"] == ["3.weight", "3.bias"]


def test_a_weights_file_of_a_proxy_can_be_named(fedinit, experiment, finals, cache):
    assert fedinit("pretrain", experiment(CLASSIFIER | {"initialization": "proxy"})).exit_code == 0
    (path,) = cache.iterdir()
    (run,) = finals(CLASSIFIER | {"initialization": str(path)}).values()
    assert len(RunFolder(run).initialization["loaded"]) == 4


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"proxy": {}}, ["proxy.dataset", "required"]),
        ({"proxy": {"dataset": "fashion-mnst"}}, ["dataset 'fashion-mnst'", "'fashion-mnist'?"]),
        ({"proxy": {"dataset": "fashion-mnist"}}, ["does not fit", "(1, 28, 28)", "fashion-mnist"]),
        ({"proxy": {**CLASSIFIER["proxy"], "lr": 1e30}}, ["proxy.lr", "not finite"]),
        ({"proxy": {**CLASSIFIER["proxy"], "rate": 1}}, ["proxy.rate", "valid"]),
        ({"proxy": {**CLASSIFIER["proxy"], "lr": 1e39}}, ["proxy: training", "overflow"]),
        ({"cohort": 99}, ["cohort: 99"]),
        (
            {"client": {"optimizer": "nova"}, "strategy": "flwr.serverapp.strategy:FedAvg"},
            ["nova needs strategy fedopt"],
        ),
        (
            {"model": "plugged_in:small_classifier", "dataset_args": {"classes": 4}},
            ["proxy (plugged_in:gaussians)", "has shape", "the model's is"],
        ),
    ],
)
def test_a_wrong_proxy_ends_in_one_line(change, texts, fedinit, experiment, tmp_path, cache):
    file = experiment(CLASSIFIER | {"initialization": "proxy"} | change)
    for command in (("run", file, "--out", tmp_path / "out"), ("pretrain", file)):
        result = fedinit(*command)
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("fedinit:")]
        assert len(lines) == 1
        for text in texts:
            assert text in lines[0]
    assert not (tmp_path / "out").exists()
    assert not cache.exists()


def test_weights_that_are_not_finite_are_not_kept(fedinit, experiment, cache):
    """The one step's loss is 9, and its gradient -6: x ends at 6e308."""
    proxy = {**POINT["proxy"], "lr": 1e308, "epochs": 1}
    result = fedinit("pretrain", experiment(POINT | {"proxy": proxy}))
    assert (result.exit_code, "proxy.lr" in result.stderr) == (2, True)
    assert "the weights are not finite" in result.stderr
    assert not cache.exists()


def test_another_file_of_the_same_name_is_another_proxy(tmp_path, monkeypatch):
    """In another folder, and where the file has changed; as it was, it is the same one."""

    def path_in(folder: str, content: bytes, modified: int) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        Path("data.pt").write_bytes(content)
        os.utime("data.pt", (modified, modified))
        proxy = {"dataset": "fashion-mnist", "dataset_args": {"path": "data.pt"}}
        return proxy_path(Run(dataset="fashion-mnist", model="cnn", proxy=proxy))

    first = path_in("a", b"0", 1)
    assert len({first, path_in("b", b"0", 1), path_in("a", b"1", 2)}) == 3
    assert path_in("a", b"0", 3) == first


def test_no_proxy_to_train_is_said(fedinit, experiment):
    result = fedinit("pretrain", experiment(CLASSIFIER))
    assert (result.exit_code, "starts from proxy" in result.stderr) == (2, True)


def test_fresh_normalization_leaves_scales_and_shifts(finals, tmp_path):
    """Of a file with every array at 0.5: `loaded` takes GroupNorm's too, `fresh` keeps 1 and 0."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GroupNorm(2, 4))
    weights = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "half.safetensors")
    settings = {
        "dataset": "plugged_in:gaussians",
        "model": "plugged_in:group_norm_network",
        "initialization": str(tmp_path / "half.safetensors"),
        "client": {"lr": 1e-30},
        "cohort": 1,
        "rounds": 1,
        "workers": 1,
        "grid": {"normalization": ["loaded", "fresh"]},
    }
    runs = finals(settings)
    loaded, fresh = (
        load_file(runs[f"normalization={each}"] / "final.safetensors")
        for each in ("loaded", "fresh")
    )
    assert all(value.eq(0.5).all() for value in loaded.values())
    assert fresh["0.weight"].eq(0.5).all()
    assert fresh["1.weight"].eq(1).all()
    assert fresh["1.bias"].abs().max() < 1e-20
    record = RunFolder(runs["normalization=fresh"]).initialization
    assert set(record["fresh"]) == set(record["unused"]) == {"1.weight", "1.bias"}


def test_a_proxy_is_of_the_code_that_trained_it(tmp_path, monkeypatch):
    """One's own module is in the name of its weights, and so is where a relative path leads."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    lab = tmp_path / "lab_of_one.py"
    lab.write_text("def net(): pass")
    run = Run(model="lab_of_one:net", dataset="x", proxy={"dataset": "y"})
    paths = {proxy_path(run), proxy_path(run)}
    lab.write_text("def net(): return 1")
    source_of.cache_clear()  # as in another process
    paths.add(proxy_path(run))
    assert len(paths) == 2
    run = Run(
        model="cnn", dataset="x", proxy={"dataset": "y", "dataset_args": {"data_dir": "texts"}}
    )
    here = proxy_path(run)
    monkeypatch.chdir("/")
    assert proxy_path(run) != here
