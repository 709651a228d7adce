"""What a client leaves behind: nothing for the next one, and nothing in what the others draw."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clients.client_optimizers import accumulated_norm
from clients.local_training import LocalDraws, LocalTraining, Workspace
from fedinit.config import Client, Run
from fedinit.parameters import Layout
from fedinit.problem import Problem, cross_entropy
from fedinit.randomness import draws_undone, seed_all
from tests.plugged_in import gaussians
from tests.test_simulation import POINT, difference, numbers


@pytest.mark.parametrize("workers", [1, 2])
def test_buffers_begin_as_they_were_sent_wherever_a_model_puts_them(workers, finals):
    """In batches of one, clients of 1 and 3 rows take 1 and 3 steps: (1 + 3 * 3) / 4 = 2.5 a round.

    `steps` and `teacher` count on from round to round; `own`, which is never sent, and its copy
    begin anew.
    """
    settings = {"model": "plugged_in:Counting", "model_args": {}, "workers": workers}
    (run,) = finals(POINT | settings).values()
    weights = load_file(run / "final.safetensors")
    assert weights["steps"].item() == pytest.approx(5, abs=1e-12)
    assert weights["teacher"].item() == pytest.approx(5, abs=1e-12)
    assert weights["last"].tolist() == [0] * 5
    assert weights["of_round"].item() == pytest.approx(2.5, abs=1e-12)
    assert "own" not in weights


def test_what_a_model_draws_does_not_depend_on_who_trained_before(finals):
    """From NumPy's and Python's own generators, as from torch's."""
    settings = POINT | {"model": "plugged_in:Noisy", "model_args": {}}
    (one,) = finals(settings | {"workers": 1}, "one").values()
    (again,) = finals(settings | {"workers": 1}, "again").values()
    (two,) = finals(settings | {"workers": 2}, "two").values()
    assert numbers(one) == numbers(again)
    assert difference(one, two) < 1e-12


@pytest.mark.parametrize("own", [{}, {"model": "plugged_in:Noisy"}, {"loss": "plugged_in:scores"}])
def test_other_generators_than_torchs_are_seeded_for_ones_own_code(own):
    run = Run(**{"dataset": "plugged_in:gaussians", "model": "linear"} | own)
    model = nn.Linear(2, 3)
    workspace = Workspace(
        Problem(gaussians(), model, cross_entropy, Layout.of(model)), torch.preserve_format
    )
    with draws_undone():
        seed_all(4)
        LocalTraining(workspace, run, LocalDraws(np.arange(3), 5, iter(())))
        drawn = random.random(), np.random.random()
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(5)))
    seed = 5 if own else 4
    assert drawn == (random.Random(seed).random(), np.random.RandomState(seed).random_sample())


def test_draws_are_undone():
    seed_all(3)
    expected = random.random(), np.random.random(), torch.rand(()).item()
    seed_all(3)
    with draws_undone():
        seed_all(4)
        assert (random.random(), np.random.random(), torch.rand(()).item()) != expected
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


def test_frozen_arrays_are_loaded_and_not_sent_back():
    """Of a body that is frozen and a buffer, only the buffer is what a client may have changed."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    layout = Layout.of(model)
    workspace = Workspace(Problem(gaussians(), model, cross_entropy, layout), torch.preserve_format)
    sent = layout.record_of(model)
    with torch.no_grad():
        model[0].weight.zero_()
    workspace.load(sent)
    assert torch.equal(model[0].weight.cpu(), layout.rest(sent)["0.weight"])
    assert set(workspace.rest()) == {f"1.{name}" for name, _ in model[1].named_buffers()}


def test_what_lies_row_major_in_channels_last_too_is_no_copy():
    """Of the weights (out, in, height, width) those with in = 1 or 1x1 are; what it lies as stays.

    An array apart is a copy, whose changes the vector has only when it is asked for.
    """
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3))
    layout = Layout.of(model)
    workspace = Workspace(Problem(gaussians(), model, cross_entropy, layout), torch.channels_last)
    vector = workspace.weights()
    together = [each.weight.untyped_storage().data_ptr() == vector.data_ptr() for each in model]
    assert together == [True, True, False]
    lies = [each.weight.is_contiguous(memory_format=torch.channels_last) for each in model]
    assert lies == [True, True, True]
    assert model[0].weight.stride() == (9, 1, 3, 1)
    with torch.no_grad():
        for number, each in enumerate(model):
            each.weight.fill_(number + 1)
            each.bias.zero_()
    expected = [1] * 36 + [0] * 4 + [2] * 16 + [0] * 4 + [3] * 72 + [0] * 2
    assert workspace.weights().tolist() == expected


@pytest.mark.parametrize(
    ("momentum", "lr", "mu", "steps", "norm"),
    [
        (0, 2.0, 1.0, 4, 4),  # (1 - lr mu)^k = 1, -1, 1, -1
        (0, 1.5, 1.0, 3, 1.75),  # 1, -1/2, 1/4
        (0.5, 1.0, 0.0, 3, 4.25),  # 1, 3/2, 7/4
        (0.5, 1.0, 1.0, 4, 2.125),  # 1, 1/2, -1/4, -3/8
    ],
)
def test_a_clients_norm_is_of_the_weights_whatever_their_sign(momentum, lr, mu, steps, norm):
    """The weights of a gradient after 1, 2, ... steps; a_i is the sum of their absolute values."""
    assert accumulated_norm(Client(momentum=momentum, lr=lr, mu=mu), steps) == pytest.approx(norm)


@pytest.mark.parametrize(
    ("proximal_mu", "client", "end"),
    [(2.0, {}, 0.9), (0.0, {"optimizer": "proximal", "mu": 2.0}, 1.02)],
)
def test_flowers_fedprox_is_fedprox(proximal_mu, client, end, finals):
    """Two full steps from 0 with mu = 2 and rate 0.1, at losses x^2 / 2 and 3 (x - 2)^2 / 2.

    The second client goes to 0.6, and from there by -0.1 (3 (0.6 - 2) + 2 * 0.6) to 0.9; the first
    stays at 0. Without the term it goes to 1.02. The strategy's mu counts, not the client's.
    """
    prox = {
        "strategy": "flwr.serverapp.strategy:FedProx",
        "strategy_args": {"proximal_mu": proximal_mu},
        "client": {"lr": 0.1, "batch_size": 4, "epochs": 2, **client},
        "rounds": 1,
    }
    (run,) = finals(POINT | prox).values()
    x = load_file(run / "final.safetensors")["x"].item()
    assert x == pytest.approx(3 / 4 * end, abs=1e-7)


def test_a_proximal_term_that_clients_lack_is_refused(fedinit, experiment, tmp_path):
    settings = {
        "strategy": "flwr.serverapp.strategy:FedProx",
        "strategy_args": {"proximal_mu": 2.0},
        "client": {"optimizer": "gd"},
    }
    result = fedinit("run", experiment(POINT | settings), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "client.optimizer: gd has no proximal term" in result.stderr
    assert "valid: sgd, proximal" in result.stderr
