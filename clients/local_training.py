"""The one training loop, on a model that is kept and reset in place for each client."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import flwr.app
import numpy as np
import torch
from torch import Tensor

from fedinit.config import Run
from fedinit.device import device
from fedinit.measurements.evaluation import correct_by_row, count_targets, per_example
from fedinit.problem import Problem
from fedinit.randomness import Draw, draws_undone, keyed, seed_all, seed_torch, torch_seed


def local_epochs(run: Run, server_round: int, client: int) -> int:
    """Number of local epochs of a client in a round; a straggler's is drawn from its range."""
    if run.stragglers.fraction == 0:
        return run.client.epochs
    rng = keyed(Draw.STRAGGLERS, run.seed, server_round, client)
    if rng.random() >= run.stragglers.fraction:
        return run.client.epochs
    return int(rng.integers(run.stragglers.epochs[0], run.stragglers.epochs[1], endpoint=True))


def local_steps(run: Run, examples: int, server_round: int, client: int) -> int:
    """Number of local steps of a client with that many examples in a round."""
    return local_epochs(run, server_round, client) * -(-examples // run.client.batch_size)


class Workspace:
    """A process's one model, kept on its device and in the memory format that it trains in.

    Args:
        problem: data set, model and loss; it is moved to the device.
        memory_format: of the model's convolutions; their inputs follow.

    Attributes:
        problem, layout: the problem, on the device, and its model's layout.
        parameters: the model's trainable arrays, in the layout's order.
        start: x, the vector that was loaded last.
    """

    def __init__(self, problem: Problem, memory_format: torch.memory_format) -> None:
        self.problem = problem.on(device())
        self.layout = problem.layout
        self.start = self._received = torch.empty(0)
        problem.model.to(memory_format=memory_format)
        parameters = dict(problem.model.named_parameters())
        self.parameters: list[Tensor] = [parameters[name] for name in self.layout.trainable]
        # Parameters are views of one vector, so that nobody gathers it, where they lie as it does.
        self._vector = torch.cat([each.detach().reshape(-1) for each in self.parameters])
        # A GPU's recurrent layers want theirs in a piece of their own.
        recurrent = any(isinstance(each, torch.nn.RNNBase) for each in problem.model.modules())
        compact = recurrent and self._vector.is_cuda
        self._apart: list[tuple[Tensor, Tensor]] = []  # the others, with their places
        for parameter, place in zip(self.parameters, self.layout.views(self._vector), strict=True):
            # Row-major but for strides of dimensions of one, which tell kernels of channels_last.
            if parameter.is_contiguous() and not compact:
                parameter.data = place.as_strided(place.shape, parameter.stride())
            else:
                self._apart.append((parameter.detach(), place))
        self._frozen = [
            _Place(problem.model, name, parameters[name])
            for name in self.layout.fixed
            if name in parameters
        ]
        self._buffers = [_Place(problem.model, *each) for each in problem.model.named_buffers()]
        for each in self._buffers:  # those that are not persistent are never sent
            each.begun = each.tensor.clone()
        # A model may change its frozen parameters, as one with a teacher does; most do not.
        self._frozen_rest: bool | None = None

    def load(self, arrays: flwr.app.ArrayRecord) -> None:
        """Reset the model to received weights x; `start` is x until the next load."""
        received = self.layout.flatten(arrays)
        if received is not self._received:
            self._received, self.start = received, received.to(self._vector)
            rest = self.layout.rest(arrays)
            for each in self._frozen:
                each.begun = rest[each.name]
                if self._frozen_rest:
                    each.set(each.begun)
            for each in self._buffers:
                if each.name in rest:
                    each.begun = rest[each.name].to(device())
        self._vector.copy_(self.start)
        for parameter, place in self._apart:
            parameter.copy_(place)
        for each in self._untrained:
            each.set(each.begun)

    def weights(self) -> Tensor:
        """Return the trainable parameters as one vector, which the next training changes."""
        for parameter, place in self._apart:
            place.copy_(parameter)
        return self._vector

    def rest(self) -> dict[str, Tensor]:
        """Return copies of what a client's training may have changed beside the vector."""
        if self._frozen_rest is None:
            self._frozen_rest = all(
                torch.equal(each.present.cpu(), each.begun) for each in self._frozen
            )
        return {
            each.name: each.present.detach().clone(memory_format=torch.contiguous_format)
            for each in self._untrained
            if each.name in self.layout.shapes
        }

    @property
    def _untrained(self) -> list["_Place"]:
        """What is reset for each client beside the vector."""
        return self._buffers if self._frozen_rest else [*self._frozen, *self._buffers]

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Let what is not trained, and what draws follow, be afterwards as they were."""
        before = [(each, each.present.detach().clone()) for each in self._untrained]
        with draws_undone():
            yield
        for each, value in before:
            each.set(value)


class _Place:
    """Where a model has an array that is not trained; it may put another one there.

    Attributes:
        name, tensor: the array's name, and the model's own array.
        begun: what each client begins with.
    """

    def __init__(self, model: torch.nn.Module, name: str, tensor: Tensor) -> None:
        owner, _, self._key = name.rpartition(".")
        self._owner = dict(model.named_modules())[owner]
        self.name = name
        self.tensor = self.begun = tensor

    @property
    def present(self) -> Tensor:
        """The array; what has another shape is no array of the model's."""
        there = getattr(self._owner, self._key)
        fits = isinstance(there, Tensor) and there.shape == self.tensor.shape
        return there if fits else self.tensor

    def set(self, value: Tensor) -> None:
        """Put the model's own array there, with these values."""
        with torch.no_grad():
            self.tensor.copy_(value)
        setattr(self._owner, self._key, self.tensor)


class LocalDraws(NamedTuple):
    """A client's rows, and what it draws in a round.

    Attributes:
        rows: in their own order.
        seed: of what its model draws, as dropout does.
        orders: the rows in the order of each local epoch, on the device, once; the first of them
            is made ahead.
    """

    rows: np.ndarray
    seed: int
    orders: Iterator[Tensor]

    @classmethod
    def of(cls, run: Run, server_round: int, client: int, rows: np.ndarray) -> "LocalDraws":
        """Return the draws of a client with these rows."""
        seed, drawn = draw_orders(run, server_round, client, rows)
        orders = map(_on_device, drawn)
        return cls(rows, seed, chain([next(orders)], orders))


def draw_orders(
    run: Run, server_round: int, client: int, rows: np.ndarray
) -> tuple[int, Iterator[np.ndarray]]:
    """Return the seed of what a client's model draws, and its rows in each local epoch's order.

    The orders are drawn as they are read, once. All is a function of the run's seed, the round and
    the client.
    """
    rng = keyed(Draw.LOCAL_TRAINING, run.seed, server_round, client)
    seed, epochs = torch_seed(rng), range(local_epochs(run, server_round, client))
    return seed, (rng.permutation(rows) if run.client.shuffle else rows for _ in epochs)


def _on_device(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(device())


@dataclass
class LocalTraining:
    """One client's local training in one round, from the weights that its workspace holds.

    Its twin for many clients at once is `vectorized.GroupTraining`: what a client optimizer uses of
    one the other has too, with what it returns for each client.

    Attributes:
        workspace: the model, loaded with x.
        run: the run's settings.
        draws: the client's rows and draws, in that round.
        steps: number of local steps done, in a list of one client.
        examples_seen, targets_seen, loss_sum, correct: sums over every example visited, for the
            train metrics; those on a GPU are read once, when it is done.
    """

    workspace: Workspace
    run: Run
    draws: LocalDraws
    steps: list[int] = field(default_factory=lambda: [0])
    examples_seen: int = 0
    targets_seen: int | Tensor = 0
    loss_sum: float | Tensor = 0.0
    correct: float | Tensor | None = 0

    def __post_init__(self) -> None:
        model = self.workspace.problem.model
        # Ours draw from torch's alone; to seed the others is a percent of a small client's update.
        (seed_all if self.run.trains_own_code else seed_torch)(self.draws.seed)
        if not model.training:
            model.train()

    def descend(self, step: Callable[[], None]) -> None:
        """Compute the gradients of each batch, bound their norm, and call `step` under no_grad.

        The last batch of an epoch may be small.
        """
        for order in self.draws.orders:
            for rows in self._batches(order):
                self._clear_gradients()
                self._losses(rows).mean().backward()
                self._bound_gradients()
                with torch.no_grad():
                    step()
                self.steps[0] += 1

    def full_gradient(self, count: bool = True) -> Tensor:
        """Return the gradient of the client's mean loss at the current weights, as one vector.

        Its norm is bounded as a batch's is.

        Args:
            count: whether this is the training itself: if not, it leaves no trace in the train
                metrics, in the model's buffers, or in the draws that follow.
        """
        self._clear_gradients()
        with nullcontext() if count else self.workspace.without_trace():
            for rows in self._batches(_on_device(self.draws.rows)):
                losses = self._losses(rows, count)
                (losses.sum() / len(self.draws.rows)).backward()
        self._bound_gradients()
        gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad
            for each in self.workspace.parameters
        ]
        return torch.cat([each.reshape(-1) for each in gradients])

    def active(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return what belongs to the clients that take the present step: here there is but one."""
        return tensors

    def metrics(self) -> list[dict[str, float]]:
        """Return the client's examples and its means over every example visited."""
        means = {"train-loss": float(self.loss_sum) / self.examples_seen}
        if self.correct is not None:
            means["train-accuracy"] = float(self.correct) / max(1.0, float(self.targets_seen))
        return [{"num-examples": len(self.draws.rows), **means}]

    def _batches(self, order: Tensor) -> Sequence[Tensor]:
        """Split rows into batches; a single one is left as it is: small clients take just one."""
        size = self.run.client.batch_size
        return [order] if len(order) <= size else order.split(size)

    def _bound_gradients(self) -> None:
        bound = self.run.client.max_grad_norm
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(self.workspace.parameters, bound)

    def _clear_gradients(self) -> None:
        for parameter in self.workspace.parameters:
            parameter.grad = None

    def _losses(self, rows: Tensor, count: bool = True) -> Tensor:
        """Return the loss of each row."""
        problem = self.workspace.problem
        inputs, targets = problem.dataset.batch(rows)
        outputs = problem.model(inputs)
        losses = per_example(problem.loss(outputs, targets), targets)
        if count:
            self.examples_seen += len(rows)
            self.targets_seen += count_targets(targets)
            self.loss_sum += _total(losses)
            right = correct_by_row(outputs, targets)
            self.correct = (
                None if right is None or self.correct is None else self.correct + _total(right)
            )
        return losses


def _total(rows: Tensor) -> float | Tensor:
    """Return a batch's sum in float64; of its few rows Python is faster, but waits for a GPU."""
    return sum(rows.tolist()) if rows.is_cpu else rows.detach().sum(dtype=torch.float64)
