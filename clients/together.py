"""Whether clients of a model can be trained as one, and how many: tried and measured.

It pays on a GPU alone: a CPU is as busy with one client's step as with many.
"""

import copy
import random
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.client_optimizers import sgd
from clients.local_training import Workspace
from clients.vectorized import groups, losses_as_one, make_training
from fedinit.config import Run, Stragglers
from fedinit.device import synchronize
from fedinit.errors import named
from fedinit.measurements.evaluation import per_example
from fedinit.problem import Problem
from fedinit.randomness import draws_undone

_ROWS = 8  # of each of the two clients that are tried
# Of their losses and gradients, relative. Where rounding puts the input of a ReLU on the other side
# of zero, a loss does not change, and a gradient does.
_TOLERANCES = 1e-4, 1e-2
_SIZES = (8, 32, 128)
_ALONE = 8  # clients whose training one by one is timed
_REPEATS, _SECONDS = 4, 2.0
_GAIN = 0.95  # of the time: what is no clear gain is not worth the memory


def obstacle(problem: Problem) -> str | None:
    """Return why clients of a model cannot be trained as one; None: they can.

    Two clients' losses and gradients are taken one by one, and as one, the second with a row less;
    the model is left as it is.
    """
    model = copy.deepcopy(problem.model).train()
    problem = Problem(problem.dataset, model, problem.loss, problem.layout)
    parameters = dict(model.named_parameters())
    trained = [parameters[name] for name in problem.layout.trainable]
    owners = problem.dataset.owners
    first = owners.at(0)[:_ROWS]
    clients = [first, owners.at(len(owners) - 1)[: max(1, len(first) - 1)]]
    on_gpu = trained[0].is_cuda
    with draws_undone():
        begun, buffers = _draws(on_gpu), [each.clone() for each in model.buffers()]
        try:
            alone = [_alone(problem, trained, rows) for rows in clients]
            if begun != _draws(on_gpu):
                return "its training draws random numbers, as dropout does"
            if not all(map(torch.equal, buffers, model.buffers())):
                return "its training changes buffers, as batch normalisation does"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that vmap falls back to a loop, say
                both = _as_one(problem, trained, clients)
        except Exception as error:  # whatever vmap, or a model under it, raises
            return f"torch.func.vmap: {named(error)}"
    for ones, others in zip(alone, both, strict=True):
        for one, other, tolerance in zip(ones, others, _TOLERANCES, strict=True):
            if not (other - one).norm() <= tolerance * one.norm():
                return "its clients do not train as one as they do one by one"
    return None


def _draws(on_gpu: bool) -> list[Any]:
    """Return where the generators are that a model may draw from."""
    numpys = np.random.get_state(legacy=False)["state"]
    torchs = torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state()
    return [random.getstate(), numpys["key"].tolist(), numpys["pos"], torchs.tolist()]


def _alone(problem: Problem, trained: Sequence[Tensor], rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return a client's mean loss and its gradient."""
    inputs, targets = problem.dataset.batch(rows)
    losses = per_example(problem.loss(problem.model(inputs), targets), targets)
    found = torch.autograd.grad(losses.mean(), trained, materialize_grads=True)
    return losses.mean().detach(), torch.cat([each.reshape(-1) for each in found])


def _as_one(
    problem: Problem, trained: Sequence[Tensor], clients: Sequence[np.ndarray]
) -> list[tuple[Tensor, Tensor]]:
    """Return each client's mean loss and its gradient."""
    width = max(map(len, clients))
    inputs, targets = problem.dataset.batch(np.stack([np.resize(each, width) for each in clients]))
    stacked = [
        each.detach().expand(len(clients), *each.shape).clone().requires_grad_() for each in trained
    ]
    _, losses = losses_as_one(problem, stacked, inputs, targets)
    means = [own[: len(rows)].mean() for own, rows in zip(losses, clients, strict=True)]
    found = torch.autograd.grad(torch.stack(means).sum(), stacked, materialize_grads=True)
    gradients = torch.cat([each.reshape(len(clients), -1) for each in found], dim=1)
    return [(mean.detach(), own) for mean, own in zip(means, gradients, strict=True)]


def fastest_together(
    problem: Problem, run: Run, memory_format: torch.memory_format, share: int
) -> int:
    """Time a round's SGD of real clients on the GPU, one by one and as one.

    Args:
        problem: data set, model and loss; the model is trained meanwhile.
        run: the run's settings.
        memory_format: of the one-by-one path.
        share: number of clients that a worker has in a round.

    Returns:
        How many clients to train as one: the number that is clearly the fastest, among those that
        fit into memory; 1 where the model cannot do with it.
    """
    share = min(share, len(problem.dataset.owners))
    if share == 1 or obstacle(problem) is not None:
        return 1
    workspace = Workspace(problem, memory_format)
    workspace.load(problem.layout.record_of(problem.model))
    plain = run.client.model_copy(update={"epochs": 1})
    run = run.model_copy(update={"client": plain, "stragglers": Stragglers()})
    best, seconds = 1, _seconds_per_step(workspace, run, range(min(share, _ALONE)), 1)
    for size in sorted({min(each, share) for each in _SIZES}):
        try:
            found = _seconds_per_step(workspace, run, range(size), size)
        except torch.OutOfMemoryError:
            break
        if found < _GAIN * seconds:
            best, seconds = size, found
    torch.cuda.empty_cache()
    return best


def _seconds_per_step(
    workspace: Workspace, run: Run, clients: Sequence[int], together: int
) -> float:
    """Return the least seconds of clients' training for each local step of each of them."""
    run = run.model_copy(update={"together": together})
    dealt = groups(run, workspace.problem.dataset.owners.sizes, 1, clients)
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    for repeat in range(_REPEATS):
        synchronize()
        begun, steps = time.perf_counter(), 0
        for group in dealt:
            training = make_training(workspace, run, 1, group)
            sgd(training, None)
            steps += sum(training.steps)
        synchronize()
        if repeat:  # the first warms up
            fastest = min(fastest, (time.perf_counter() - begun) / steps)
            if time.perf_counter() > end:
                break
    return fastest
