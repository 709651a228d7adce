"""Clients trained as one are what they are one by one: the same weights, the same numbers."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch

from clients import client_optimizers, local_training, vectorized
from clients.client_optimizers import ServerState
from clients.together import fastest_together
from experiments.wiring import Datasets, simulation
from fedinit.config import make_run
from fedinit.data import federated_dataset
from fedinit.device import device
from fedinit.parameters import Array
from fedinit.problem import build_problem, load_dataset
from fedinit.registry import add_to_path
from fedinit.results import RunFolder
from strategies import SERVER_OPTIMIZERS
from tests.conftest import HERE
from tests.plugged_in import UNEQUAL
from tests.test_simulation import difference, numbers

CLIENTS = ["sgd", "gd", "proximal", "nova", "mimelite"]
# Batches of 4 of clients of 1 to 12 rows: small last batches and unequal steps; a worker has 3 or 4
# clients in a round, so that groups of 3 are whole and leave one over, and one of 50 is the share.
SETTINGS = {
    "client": {
        "lr": 0.05,
        "batch_size": 4,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "mu": 0.2,
        "max_grad_norm": 0.5,
    },
    "stragglers": {"fraction": 0.5, "epochs": [2, 3]},
    "cohort": len(UNEQUAL),
    "rounds": 2,
    "evaluate_every": 1,
    "workers": 2,
}
IMAGES = SETTINGS | {
    "dataset": "plugged_in:unequal_images",
    "model": "cnn",
    "memory_format": "contiguous",
    "server": {"optimizer": "momentum", "lr": 0.3},
}
TEXTS = SETTINGS | {
    "dataset": "plugged_in:unequal_texts",
    "model": "plugged_in:NextToken",
    "server": {"optimizer": "adam", "lr": 0.1},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def same(one, other) -> None:
    assert difference(one, other) < 1e-5
    for ours, theirs in zip(numbers(one), numbers(other), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("settings", [IMAGES, TEXTS], ids=["images", "texts"])
def test_every_client_optimizer_trains_many_clients_as_it_trains_one(settings, finals):
    runs = finals(settings | {"grid": {"client.optimizer": CLIENTS, "together": [1, 3, 50]}})
    assert len(runs) == 15
    for client in CLIENTS:
        alone, *others = (
            runs[f"client.optimizer={client},together={together}"] for together in (1, 3, 50)
        )
        assert all(line["train_loss"] > 0 for line in numbers(alone)[1:])
        for other in others:
            same(alone, other)


def test_replies_of_single_clients_come_from_groups_too(finals):
    """Flower's FedAvg gets one reply for each client. Without a GPU `auto` is one by one."""
    flower = {"strategy": "flwr.serverapp.strategy:FedAvg", "server": {}}
    runs = finals(TEXTS | flower | {"grid": {"together": ["auto", 3]}})
    same(runs["together=auto"], runs["together=3"])
    if not torch.cuda.is_available():
        assert RunFolder(runs["together=auto"]).run.together == 1


def test_bounds_stragglers_and_the_unused_parameter_are_at_work(finals):
    """What the equality above rests on: each setting changes the weights."""
    changes = {"client.max_grad_norm": [0.5, 9.0], "stragglers.fraction": [0.5, 0.0]}
    runs = list(finals(TEXTS | {"grid": changes, "together": 3}).values())
    for one, other in itertools.combinations(runs, 2):
        assert difference(one, other) > 1e-4
    assert RunFolder(runs[0]).weights["unused"].tolist() == [1, 1, 1]  # not decayed


def test_a_resumed_run_keeps_its_groups(fedinit, experiment, ray_started, tmp_path):
    file, out = experiment(TEXTS | {"together": 3, "rounds": 1}), tmp_path / "out"
    assert fedinit("run", file, "--out", out).exit_code == 0
    folder = RunFolder(out / "experiment")
    assert folder.run.together == 3
    (folder.path / "final.safetensors").unlink()
    again = ("run", file, "--out", out, "--resume", "--set")
    refused = fedinit(*again, "together=2")
    assert (refused.exit_code, "other settings" in refused.stderr) == (2, True)
    assert fedinit(*again, "together=auto").exit_code == 0
    assert (folder.status, folder.run.together) == ("done", 3)


def test_who_failed_in_a_group_is_found_one_by_one(fedinit, experiment, ray_started, tmp_path):
    """The optimum of client 3 is at 13, which the loss refuses; it is in a group with client 2."""
    optimum = [[0.0], [1.0], [2.0], [13.0], [4.0]]
    data = {"curvature": [[1.0]] * 5, "optimum": optimum, "examples": [4] * 5}
    file = experiment(
        {
            "dataset": "plugged_in:quadratics",
            "dataset_args": data | {"test_optimum": [0.0]},
            "model": "plugged_in:Point",
            "model_args": {"size": 1},
            "loss": "plugged_in:superstitious",
            "cohort": 5,
            "rounds": 1,
            "workers": 1,
            "together": 2,
        }
    )
    assert fedinit("run", file, "--out", tmp_path / "out").exit_code == 1
    [run] = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert "client 3 'client 3' failed to train in round 1: ValueError: thirteen" in run["error"]


@pytest.mark.parametrize("settings", [IMAGES, TEXTS], ids=["images", "texts"])
def test_training_lies_on_one_device_and_waits_for_nothing_there(settings, monkeypatch):
    """On the meta device, where there are no values, a tensor from elsewhere is refused, and so is
    whoever reads one: no step, no full gradient of any client optimizer does, alone or as one.
    """
    add_to_path([str(HERE)])
    elsewhere = torch.device("meta")
    for module in (local_training, vectorized, client_optimizers):
        monkeypatch.setattr(module, "device", lambda: elsewhere)
    monkeypatch.setattr(federated_dataset, "free_bytes", lambda: 1 << 40)
    run = make_run(settings)
    prepared = simulation(run, Datasets())
    workspace = local_training.Workspace(prepared.problem, torch.contiguous_format)
    workspace.load(prepared.arrays)
    size = len(prepared.problem.layout.flatten(prepared.arrays))
    state = {"momentum_buffer": Array(np.zeros(size, np.float32))}
    server = ServerState(partial(SERVER_OPTIMIZERS["momentum"], settings=run.server), state)
    as_one = run.model_copy(update={"together": len(UNEQUAL)})
    [everybody] = vectorized.groups(as_one, np.array(UNEQUAL), 1, range(len(UNEQUAL)))
    for name in CLIENTS:
        for group in ([0], everybody):
            training = vectorized.make_training(workspace, run, 1, group)
            update = client_optimizers.CLIENT_OPTIMIZERS[name](training, server)
            assert update.weights.is_meta
            assert update.weights.numel() == len(group) * size


@pytest.mark.parametrize(("model", "expected"), [("SlowToStart", 4), ("Recurrent", 1)])
def test_the_measurement_takes_what_is_faster_among_what_the_model_can_do_with(model, expected):
    """Of a worker's 4 clients: where a step costs the same for one and for four, four."""
    add_to_path([str(HERE)])
    settings = {"dataset": "plugged_in:noise_images", "model": f"plugged_in:{model}", "cohort": 4}
    run = make_run(settings | {"client": {"batch_size": 4}})
    problem = simulation(run, Datasets()).problem
    assert fastest_together(problem, run, torch.contiguous_format, share=4) == expected


@needs_gpu
def test_on_a_gpu_the_data_lie_there_and_a_batch_is_made_there():
    add_to_path([str(HERE)])
    run = make_run({key: IMAGES[key] for key in ("dataset", "model")})
    problem = build_problem(run, load_dataset(run)).on(device())
    inputs, targets = problem.dataset.batch(problem.dataset.owners.at(0))
    assert problem.dataset.inputs.is_cuda
    assert inputs.is_cuda
    assert targets.is_cuda
    assert all(each.is_cuda for each in problem.model.parameters())


@needs_gpu
def test_on_a_gpu_a_measurement_says_how_many(finals):
    (run,) = finals(IMAGES).values()
    assert RunFolder(run).run.together >= 1
