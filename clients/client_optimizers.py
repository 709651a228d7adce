"""What a client does to turn x into y: five ways, each a small function.

Each is written once, for a client trained alone and for clients trained as one: all of it is
elementwise, so that arrays may have a first dimension, that of the clients.

sgd      mini-batch SGD (McMahan et al. 2017, FedAvg)
gd       no local steps: the update is the full-batch gradient (FedSGD with server sgd)
proximal SGD on F_i(y) + mu/2 ||y - x||^2 (Li et al. 2020, FedProx, eq. 2)
nova     SGD; the mean is of updates divided by the local work (Wang et al. 2020, FedNova, eq. 6)
mimelite SGD steps with the server's optimizer state, frozen (Karimireddy et al. 2020, MimeLite)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from clients.local_training import LocalTraining
from clients.vectorized import GroupTraining
from fedinit.cohort import LOCAL_NORM, Trained
from fedinit.config import Client
from fedinit.device import device
from fedinit.parameters import tensor

# The base optimizer of a mimelite client: the server's own, at the client's rate.
OptimizerFactory = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


Training = LocalTraining | GroupTraining


@dataclass
class Update:
    """What clients send back: trained weights, metrics beside the usual ones, further arrays.

    Attributes:
        weights: y (size,) of a client trained alone, or (clients, size); `extra` likewise.
        metrics: a value for each client.
    """

    weights: Tensor
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def per_client(training: Training, update: Update, rest: Mapping[str, Tensor]) -> list[Trained]:
    """Return what each client of a training makes of x; the arrays that are not trained are alike.

    Args:
        training: the training that is done.
        update: what the client optimizer made of it.
        rest: the model's arrays outside the vector.
    """
    weights = _each(update.weights)
    extra = {
        name: {key: _each(value) for key, value in arrays.items()}
        for name, arrays in update.extra.items()
    }
    return [
        Trained(
            weights[place],
            metrics | {name: values[place] for name, values in update.metrics.items()},
            rest,
            {
                name: {key: values[place] for key, values in arrays.items()}
                for name, arrays in extra.items()
            },
        )
        for place, metrics in enumerate(training.metrics())
    ]


def _each(vectors: Tensor) -> Sequence[Tensor]:
    """Return each client's vector; that of a client trained alone as it is.

    Whoever sums sees by this, without a view, that the next client's y is the same tensor.
    """
    return [vectors] if vectors.ndim == 1 else vectors.unbind()


@dataclass(frozen=True)
class ServerState:
    """What the server shares with its clients beside x: its optimizer, and that one's state."""

    optimizer: OptimizerFactory
    state: ArrayRecord


ClientOptimizer = Callable[[Training, ServerState | None], Update]


def sgd(training: Training, _server: ServerState | None) -> Update:
    """Mini-batch SGD with the client's momentum and weight decay, fresh each round."""
    training.descend(_sgd_step(training))
    return Update(training.workspace.weights())


def gd(training: Training, _server: ServerState | None) -> Update:
    """Return y = x - g with g the full-batch gradient at x; no client rate, no local epochs.

    y is rounded to the model's dtype, as any client's is: in float32 an entry of g far below 1e-7
    of x's is lost.
    """
    return Update(training.workspace.start - training.full_gradient())


def proximal(training: Training, _server: ServerState | None) -> Update:
    """SGD on the loss and mu/2 ||y - x||^2; the bound on the gradient norm is on the loss's."""
    training.descend(_sgd_step(training, training.run.client.mu))
    return Update(training.workspace.weights())


def nova(training: Training, _server: ServerState | None) -> Update:
    """SGD (proximal when mu > 0) that tells a_i: the mean is of D_i / a_i, times the mean a_i."""
    settings = training.run.client
    training.descend(_sgd_step(training, settings.mu))
    norms = [accumulated_norm(settings, steps) for steps in training.steps]
    return Update(training.workspace.weights(), {LOCAL_NORM: norms})


def mimelite(training: Training, server: ServerState | None) -> Update:
    """Steps of the server's optimizer from its frozen state; also the full-batch gradient at x."""
    if server is None:
        raise ValueError("mimelite clients need the server's optimizer state")
    workspace = training.workspace
    gradient = training.full_gradient(count=False)  # the train metrics are of the local steps
    optimizer = server.optimizer(workspace.parameters)
    views = {
        name: workspace.layout.views(value.to(device())) if value.ndim else value
        for name, value in ((name, tensor(array)) for name, array in server.state.items())
    }

    def frozen_step() -> None:
        optimizer.param_groups[0]["params"] = workspace.parameters
        optimizer.state.clear()
        for index, parameter in enumerate(workspace.parameters):
            optimizer.state[parameter] = {
                name: (
                    value[index].expand_as(parameter) if isinstance(value, list) else value
                ).clone()
                for name, value in views.items()
            }
        optimizer.step()

    training.descend(frozen_step)
    return Update(workspace.weights(), extra={"gradients": {"gradient": gradient}})


CLIENT_OPTIMIZERS: dict[str, ClientOptimizer] = {
    "sgd": sgd,
    "gd": gd,
    "proximal": proximal,
    "nova": nova,
    "mimelite": mimelite,
}
# These mean what their papers say only with a server that knows of them: strategy `fedopt`.
NEED_FEDOPT = {"nova", "mimelite"}
OBEY_PROXIMAL_MU = ("sgd", "proximal")  # of Flower's FedProx
NO_LOCAL_STEPS = ("gd",)  # whatever the local epochs are
FULL_GRADIENT = ("gd", "mimelite")  # pass once through all examples at x


def accumulated_norm(settings: Client, steps: int) -> float:
    """Return a_i, the L1 norm of the weights with which D_i / lr sums the local gradients.

    FedNova, section 4: `steps` for plain SGD, [t - r (1 - r^t) / (1 - r)] / (1 - r) with momentum
    r, and a <- (1 - lr mu) a + 1 with the proximal term. By the local recursion itself: a
    gradient's weight depends on how many steps ago it was alone, so that one gradient of one,
    followed through all steps, has the weights of all. With momentum and mu some are negative.
    """
    weight, velocity, norm = 0.0, 1.0, 0.0  # (x - y) / lr, and the momentum buffer, of that one
    for _ in range(steps):
        weight += velocity
        norm += abs(weight)
        velocity = settings.momentum * velocity - settings.lr * settings.mu * weight
    return norm


def _sgd_step(training: Training, mu: float = 0.0) -> Callable[[], None]:
    """Return a step of SGD, d = g + mu (y - x) + decay y; v = momentum v + d; y -= lr v.

    It is called under no_grad: decorated, it would be wrapped anew for each client.
    torch.optim.SGD does the same; its bookkeeping is 5% of a small model's step.
    """
    settings, workspace = training.run.client, training.workspace
    anchors = workspace.layout.views(workspace.start) if mu else []
    velocities: dict[int, Tensor] = {}

    def step() -> None:
        used = [index for index, each in enumerate(workspace.parameters) if each.grad is not None]
        points = [workspace.parameters[index] for index in used]
        directions: Any = [each.grad for each in points]
        if mu:
            away = torch._foreach_sub(points, [anchors[index] for index in used])
            directions = torch._foreach_add(directions, away, alpha=mu)
        if settings.weight_decay:
            directions = torch._foreach_add(directions, points, alpha=settings.weight_decay)
        if settings.momentum:
            for index in used:
                if index not in velocities:
                    velocities[index] = torch.zeros_like(workspace.parameters[index])
            velocity = training.active([velocities[index] for index in used])
            torch._foreach_mul_(velocity, settings.momentum)
            torch._foreach_add_(velocity, directions)
            directions = velocity
        torch._foreach_add_(points, directions, alpha=-settings.lr)

    return step
