"""Every wrong request ends in one clear line and exit status 2, before Ray starts."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedinit import assets
from fedinit.errors import RequestError
from fedinit.simulation.workers import _start_ray

RUN = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:dropout_classifier",
    "cohort": 3,
    "rounds": 1,
    "workers": 1,
}
FASHION = {
    "dataset": "fashion-mnist",
    "partition": {"kind": "dirichlet", "alpha": 0.1, "clients": 10},
    "model": "cnn",
}

CASES = {
    "unknown key": ({"client": {"lrr": 0.1}}, ["unknown key 'client.lrr'", "mean 'client.lr'?"]),
    "unknown top key": ({"round": 3}, ["unknown key 'round'", "mean 'rounds'?", "cohort"]),
    "unknown grid key": ({"grid": {"client.rate": [1]}}, ["unknown key 'client.rate'"]),
    "unknown when key": (
        {"when": [{"match": {"servr.lr": 1}, "set": {}}]},
        ["unknown key 'servr.lr'", "mean 'server.lr'?"],
    ),
    "malformed when": ({"when": [{"if": 1}]}, ["when", "match", "set"]),
    "when is no list": ({"when": {"match": {}, "set": {}}}, ["when", "expected a list"]),
    "a name that is no folder": ({"name": ".."}, ["name", "'..'"]),
    "null section": ({"client": None}, ["client", "dictionary", "None"]),
    "not a number": ({"client": {"lr": float("nan")}}, ["client.lr", "finite"]),
    "a rule against the grid": (
        {"grid": {"cohort": [1, 2]}, "when": [{"match": {}, "set": {"cohort": 3}}]},
        ["grid: cohort", "a rule changes", "cohort=1"],
    ),
    "neither a number nor auto": ({"together": "two"}, ["together: ", "integer or 'auto', got"]),
    "keys that are no text": (
        {"client": {None: 1, 1.5: 2}},
        ["client: Keys should be strings, got"],
    ),
    "one beta": ({"server": {"betas": [0.9]}}, ["server.betas: a value is missing, got [0.9]"]),
    "workers: none": ({"workers": 0}, ["workers: ", "greater than 0"]),
    "malformed preset": ({"presets": [1]}, ["presets", "name"]),
    "unknown study": ({"study": "rankin"}, ["study", "'rankin'", "mean 'ranking'?"]),
    "missing rules": ({"rules": ["nowhere.yaml"]}, ["nowhere.yaml", "No such file"]),
    "rules that are no files": ({"rules": [3]}, ["rules", "list of files"]),
    "a share that is whole": ({"validation": 1.0}, ["validation", "less than 1"]),
    "a share of no row": ({"validation": 0.01}, ["validation", "0.01", "one row"]),
    "runs alike": ({"grid": {"seed": [0, 0]}}, ["grid", "two runs", "seed=0"]),
    "empty grid": ({"grid": {"seed": []}}, ["grid: seed", "list of values"]),
    "wrong type": ({"rounds": "many"}, ["rounds", "integer", "'many'"]),
    "float for int": ({"cohort": 2.5}, ["cohort", "integer", "2.5"]),
    "not a mapping": ({"client": 3}, ["client", "3"]),
    "missing key": ({"model": None}, ["model", "string"]),
    "negative rate": ({"client": {"lr": -1}}, ["client.lr", "greater than 0", "-1"]),
    "unknown dataset": ({"dataset": "fashion-mnits"}, ["'fashion-mnits'", "'fashion-mnist'?"]),
    "unknown model": ({"model": "squeezenet"}, ["unknown model", "squeezenet1_1", "charrnn"]),
    "unknown client": ({"client": {"optimizer": "sdg"}}, ["client.optimizer 'sdg'", "'sgd'?"]),
    "unknown server": ({"server": {"optimizer": "adm"}}, ["server.optimizer 'adm'", "'adam'?"]),
    "unknown strategy": ({"strategy": "fedpot"}, ["strategy 'fedpot'", "'fedopt'?"]),
    "unknown loss": ({"loss": "crossentropy"}, ["loss 'crossentropy'", "'cross-entropy'?"]),
    "unknown initialization": (
        {"initialization": "pretraind"},
        ["initialization 'pretraind'", "'pretrained'?"],
    ),
    "unknown partition": ({"partition": {"kind": "dirichelt"}}, ["partition.kind", "dirichlet"]),
    "zero alpha": ({"partition": {"alpha": 0}}, ["partition.alpha", "greater than 0"]),
    "negative alpha": ({"partition": {"alpha": -0.1}}, ["partition.alpha", "greater than 0"]),
    "cohort too large": ({"cohort": 7}, ["cohort: 7", "6 clients"]),
    "too many clients": (
        FASHION | {"partition": {"kind": "iid", "clients": 6001}},
        ["partition.clients: 6001", "6000 rows"],
    ),
    "no natural clients": (FASHION | {"partition": {"kind": "natural"}}, ["natural", "dirichlet"]),
    "no pretrained weights": (FASHION | {"initialization": "pretrained"}, ["'cnn'", "pretrained"]),
    "no head": (
        {"model": "plugged_in:batch_norm_classifier", "trainable": "head"},
        ["trainable", "head"],
    ),
    "dropout as one": ({"together": 3}, ["together: 3", "dropout_classifier", "random numbers"]),
    "batch norm as one": (
        {"together": 3, "model": "plugged_in:batch_norm_classifier"},
        ["together: 3", "buffers, as batch normalisation"],
    ),
    "batches as one": ({"together": 3, "model": "plugged_in:MixesRows"}, ["together: 3", "do not"]),
    "none as one": ({"together": 0}, ["together: ", "greater than 0"]),
    "nova needs fedopt": (
        {"client": {"optimizer": "nova"}, "strategy": "flwr.serverapp.strategy:FedAvg"},
        ["nova", "fedopt"],
    ),
    "stragglers reversed": ({"stragglers": {"epochs": [5, 1]}}, ["stragglers.epochs", "[5, 1]"]),
    "no such module": ({"model": "nowhere:Model"}, ["model", "nowhere", "ModuleNotFoundError"]),
    "no such attribute": ({"model": "plugged_in:Nothing"}, ["model", "Nothing", "AttributeError"]),
    "an attribute misspelt": ({"model": "plugged_in:Pont"}, ["Pont", "did you mean 'Point'?"]),
    "unknown argument": (
        {"dataset_args": {"client": 3}},
        ["dataset_args", "'client'", "mean 'clients'?"],
    ),
    "argument of a function that takes none": (
        {"dataset": "plugged_in:other_gaussians", "dataset_args": {"clients": 3}},
        ["unknown dataset_args key 'clients'", "valid: none"],
    ),
    "a loss of scores": (
        {"loss": "plugged_in:scores"},
        ["plugged_in:scores", "the loss has shape (2, 3)", "one for each example"],
    ),
    "a head of nothing": (
        {"model": "plugged_in:headless", "trainable": "head"},
        ["trainable", "'plugged_in:headless'", "'nowhere'", "valid: 0"],
    ),
    "axes that meet": (
        {"grid": {"client.lr": [0.1], "client": [{"lr": 0.2, "mu": 0.1}]}},
        ["grid: client.lr is on two axes"],
    ),
    "several values of one": ({"seed": [0, 1]}, ["seed: ", "[0, 1]", "grid: {seed: [...]}"]),
    "a median in the workers": (
        {"strategy": "flwr.serverapp.strategy:FedMedian", "reduce": "worker"},
        ["reduce: workers average, FedMedian needs each client's reply", "valid: auto, client"],
    ),
    "a number that is none": (
        {
            "dataset": "plugged_in:quadratics",
            "dataset_args": {
                "curvature": [[1.0], [1.0]],
                "optimum": [[0.0], [float("nan")]],
                "examples": [2, 1],
            },
        },
        ["dataset: targets, row 2: a number is not finite"],
    ),
    "labels below zero": (
        {"dataset": "plugged_in:signs"},
        ["'plugged_in:signs' has the target -1", "labels from 0"],
    ),
    "a label beyond the data set's": (
        {"dataset": "plugged_in:signs", "dataset_args": {"least": 0, "classes": 1}},
        ["'plugged_in:signs' has the target 1", "labels from 0 to 0 of model"],
    ),
    "a loss that is no factory": (
        {"loss": "plugged_in:half_squared_error", "loss_args": {"outputs": 1}},
        ["half_squared_error failed", "with loss_args it is called with them alone"],
    ),
    "a cnn of numbers": ({"model": "cnn"}, ["model: cnn reads images", "not (8,)"]),
    "a parameter that NumPy lacks": (
        {"model": "plugged_in:linear_classifier", "model_args": {"dtype": "bfloat16"}},
        ["model: 'weight' is torch.bfloat16", "arrays cannot hold"],
    ),
    "complex weights": (
        {"model": "plugged_in:linear_classifier", "model_args": {"dtype": "complex64"}},
        ["model: trainable parameters must be real numbers, found torch.complex64"],
    ),
    "a column that is a list": (
        {"dataset": "plugged_in:listed"},
        ["dataset: targets is a list, expected a torch.Tensor"],
    ),
    "a loss that is a mean": (
        {"loss": "torch.nn.functional:cross_entropy"},
        ["torch.nn.functional:cross_entropy", "one number", "each example (reduction='none')"],
    ),
    "not a dataset": ({"dataset": "plugged_in:half_squared_error"}, ["dataset", "failed"]),
    "not a module": ({"model": "plugged_in:gaussians"}, ["model", "FederatedDataset", "Module"]),
    "not a strategy": ({"strategy": "plugged_in:gaussians"}, ["strategy", "FederatedDataset"]),
    "a class that is no strategy": (
        {"strategy": "torch.nn:Linear", "strategy_args": {"keep": 1}},
        ["strategy: 'torch.nn:Linear' is the class Linear, expected a"],
    ),
    "model does not fit": (
        FASHION | {"model": "plugged_in:dropout_classifier"},
        ["does not fit", "(1, 28, 28)"],
    ),
    "missing weights": (
        {"initialization": "none.safetensors"},
        ["none.safetensors", "no such file"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings(case, refused):
    settings, expected = CASES[case]
    merged = {**RUN, **settings}
    line = refused(merged)
    for part in expected:
        assert part in line, line


def test_a_key_given_twice(fedinit, tmp_path):
    (tmp_path / "twice.yaml").write_text("rounds: 2\nclient: {lr: 0.1}\nrounds: 5\n")
    result = fedinit("run", tmp_path / "twice.yaml")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "twice.yaml" in line
    assert "'rounds' is given twice" in line
    assert "line 3" in line
    assert "unicode string" not in line


def test_of_valid_keys_those_of_the_section_are_listed(refused):
    line = refused(RUN | {"server": {"learning_rate": 0.1}})
    assert "unknown key 'server.learning_rate'" in line
    assert "server.lr" in line
    assert "client.lr" not in line
    line = refused(RUN, "--set", "clien.lr=0.1")
    assert "did you mean 'client.lr'?" in line
    assert "cohort" in line
    assert "server.lr" not in line
    line = refused(RUN | {"presest": {}})
    assert "did you mean 'presets'?" in line
    assert "grid" in line
    assert "server.lr" not in line


def test_keys_that_are_right_somewhere_else(refused):
    assert "client.lr: write it as `client: {lr: ...}`" in refused(RUN | {"client.lr": 0.1})
    line = refused(RUN | {"presets": {"small": {"presets": {}}}})
    assert "unknown key 'presets'; " in line
    assert "did you mean 'presets'" not in line


def test_a_dry_run_fetches_no_weights_and_says_that_they_are_missing(
    fedinit, experiment, tmp_path, monkeypatch
):
    def fetch(*_args):
        raise AssertionError("a dry run fetches something")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    settings = {"model": "resnet18", "initialization": "pretrained"}
    result = fedinit("run", experiment(RUN | FASHION | settings), "--dry-run")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "not ready here: initialization: cannot download https://" in told
    assert "put that file at" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "initialization=none.safetensors"], "none.safetensors: no such file"),
        (["--set", "strategy=fedpot"], "unknown strategy 'fedpot'"),
        (["--set", "dataset=fashion-mnits"], "did you mean 'fashion-mnist'?"),
        (["--set", "dataset_args={client: 3}"], "did you mean 'clients'?"),
        (["--resume"], "--resume needs --out DIR"),
        (["--out", "."], "--out .: not empty"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(arguments, told, fedinit, experiment):
    result = fedinit("run", experiment(RUN), "--dry-run", *arguments)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    assert told in line


@pytest.mark.parametrize("command", ["run", "tune"])
def test_what_to_resume_is_to_be_said(command, fedinit, experiment):
    result = fedinit(command, experiment(RUN), "--resume")
    assert result.exit_code == 2
    told = "fedinit: --resume needs --out DIR, the results folder to go on in"
    assert result.stderr.splitlines() == [told]


def test_too_few_cpus_end_in_one_line_as_well(fedinit, experiment, ray_started, tmp_path):
    result = fedinit("run", experiment(RUN | {"workers": 999}), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["fedinit: workers: 999 workers, but Ray has 4 CPUs"]


def test_too_few_cpus_for_one_run_of_several(fedinit, experiment, ray_started, tmp_path):
    """They are known before another run is made."""
    out = tmp_path / "out"
    several = RUN | {"grid": {"workers": [1, 999]}}
    result = fedinit("run", experiment(several), "--out", out)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["fedinit: workers: 999 workers, but Ray has 4 CPUs"]
    assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_refused_request_leaves_ones_own_empty_folder(
    kind, fedinit, experiment, ray_started, tmp_path
):
    (folder := tmp_path / "folder").mkdir()
    out = folder
    if kind == "link":
        (out := tmp_path / "link").symlink_to(folder)
    result = fedinit("run", experiment(RUN | {"workers": 999}), "--out", out)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["fedinit: workers: 999 workers, but Ray has 4 CPUs"]
    assert list(out.iterdir()) == []


def test_wrong_overrides(refused):
    assert "expected dotted.key=value" in refused(RUN, "--set", "client.lr")
    assert "mean 'client.lr'?" in refused(RUN, "--set", "client.lt=0.1")
    assert "not a YAML value" in refused(RUN, "--set", "client.lr=[1")
    assert "--set name=mine: name is for the file" in refused(RUN, "--set", "name=mine")


def test_a_file_that_is_missing_or_not_yaml(fedinit, tmp_path):
    result = fedinit("run", tmp_path / "nothing.yaml")
    assert (result.exit_code, "No such file" in result.stderr) == (2, True)
    result = fedinit("run", "quikstart")
    assert (result.exit_code, "did you mean 'quickstart'?" in result.stderr) == (2, True)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    result = fedinit("run", broken)
    assert (result.exit_code, "not YAML" in result.stderr) == (2, True)
    assert len(result.stderr.splitlines()) == 1
    assert fedinit("report", tmp_path).exit_code == 2


def _weights() -> dict[str, torch.Tensor]:
    """Weights that fit `dropout_classifier(num_classes=3)`, the head included."""
    return {
        "0.weight": torch.ones(16, 8),
        "0.bias": torch.ones(16),
        "3.weight": torch.ones(3, 16),
        "3.bias": torch.ones(3),
    }


def test_weights_that_do_not_fit(refused, tmp_path):
    file = tmp_path / "w.safetensors"
    run = RUN | {"initialization": "w.safetensors"}

    save_file(_weights() | {"0.bias": torch.ones(17)}, file)
    line = refused(run)
    assert "'0.bias' has shape (17,), the model's is (16,)" in line

    save_file({name: value for name, value in _weights().items() if name != "0.bias"}, file)
    assert "'0.bias' is missing" in refused(run)

    save_file(_weights() | {"5.bias": torch.ones(1)}, file)
    assert "the model has no '5.bias'" in refused(run)

    save_file(_weights(), file)
    file.write_bytes(file.read_bytes()[:-10])
    assert "not readable weights" in refused(run)


def test_weights_that_would_run_code_are_refused_unread(refused, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"0.weight": Touch()}, tmp_path / "w.pt")
    assert "not readable weights" in refused(RUN | {"initialization": "w.pt"})
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_damaged_embedded_files(damage, refused, tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    shutil.copytree(assets.FOLDER, folder)
    name = "fashion-mnist-train.parquet"
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    assets.asset.cache_clear()
    monkeypatch.setattr(assets, "FOLDER", folder)
    line = refused(RUN | FASHION)
    assert name in line
    assert ("No such file" if damage == "missing" else "corrupt") in line
    assets.asset.cache_clear()


def test_results_are_never_overwritten(fedinit, experiment, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = fedinit("run", experiment(RUN), "--out", out)
    assert (result.exit_code, "--resume" in result.stderr) == (2, True)
    assert [each.name for each in out.iterdir()] == ["thesis.txt"]


def test_a_cluster_that_is_not_there_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RequestError, match=f"--address {address}: nobody answers: .*refused"):
        _start_ray([], address)
