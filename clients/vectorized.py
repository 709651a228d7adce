"""Many clients' local training as one: parameters stacked, one step of all of them at a time.

A GPU is idle while a small model trains one client: here a step of many is one pass, by torch.func
(vmap over the clients). Clients are in the order of their local steps, the most first, so that
those that still have a step to take are the first k, and nothing of the others moves.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from clients.local_training import (
    LocalDraws,
    LocalTraining,
    Workspace,
    draw_orders,
    local_steps,
)
from fedinit.config import Run
from fedinit.device import device
from fedinit.measurements.evaluation import correct_by_row, per_example, targets_by_row
from fedinit.problem import Problem


def groups(
    run: Run, sizes: np.ndarray, server_round: int, clients: Sequence[int]
) -> list[list[int]]:
    """Deal clients to groups of `together`, alike in steps and examples, the most steps first.

    Args:
        run: the run's settings; `together` of 1 or `auto` leaves every client alone, in order.
        sizes: number of examples of every client.
        server_round: the round, which decides who straggles.
        clients: those of one share.
    """
    together = run.together
    if isinstance(together, str) or together == 1:
        return [[client] for client in clients]
    work = {
        each: (local_steps(run, int(sizes[each]), server_round, each), int(sizes[each]))
        for each in clients
    }
    ordered = sorted(clients, key=lambda each: work[each], reverse=True)
    return [ordered[at : at + together] for at in range(0, len(ordered), together)]


def make_training(
    workspace: Workspace,
    run: Run,
    server_round: int,
    group: Sequence[int],
    draws: LocalDraws | None = None,
) -> "LocalTraining | GroupTraining":
    """Return the local training of a group: of many clients as one, of a single one as it is.

    Args:
        workspace: the model, loaded with x.
        run: the run's settings.
        server_round: the round, from 1.
        group: the clients.
        draws: a single client's, where they were made ahead.
    """
    if len(group) == 1:
        owners = workspace.problem.dataset.owners
        draws = draws or LocalDraws.of(run, server_round, group[0], owners.at(group[0]))
        return LocalTraining(workspace, run, draws)
    return GroupTraining(workspace, run, server_round, group)


class Stack:
    """The trainable arrays of many clients, with the clients in a first dimension.

    Attributes:
        layout, start: the workspace's.
        parameters: the arrays (k, ...) of the clients that take the present step, with gradients.
    """

    def __init__(self, workspace: Workspace, clients: int) -> None:
        self.layout, self.start = workspace.layout, workspace.start
        self.clients = clients
        self._whole = [
            view.expand(clients, *view.shape).clone() for view in self.layout.views(self.start)
        ]
        self.parameters: list[Tensor] = []
        self.activate(clients)

    def activate(self, clients: int) -> None:
        """Let only the first `clients` take part from now on."""
        self.parameters = [each[:clients].requires_grad_() for each in self._whole]

    def weights(self) -> Tensor:
        """Return copies of the clients' vectors (clients, size)."""
        return torch.cat([each.reshape(self.clients, -1) for each in self._whole], dim=1)


class Batches:
    """The batches of many clients, padded to one size.

    Args:
        orders: each client's rows in the order of each of its epochs.
        size: rows of a batch; the last of an epoch may be small.

    Attributes:
        steps: number of batches of each client.
        rows: row numbers (most steps, clients, size) on the device; padding is the client's own.
        counts: number of rows that count (most steps, clients), likewise.
        widths: the largest batch of each step.
        active: number of clients that still have a batch, for each step.
    """

    def __init__(self, orders: Iterable[Sequence[np.ndarray]], size: int) -> None:
        orders = list(orders)
        size = min(size, max(len(epochs[0]) for epochs in orders))
        self.steps = [sum(-(-len(each) // size) for each in epochs) for epochs in orders]
        rows = np.empty((max(self.steps), len(orders), size), np.int64)
        rows[:] = np.array([epochs[0][0] for epochs in orders])[:, None]
        counts = np.zeros(rows.shape[:2], np.int64)
        for client, epochs in enumerate(orders):
            step = 0
            for order in epochs:
                whole, rest = divmod(len(order), size)
                end = step + whole
                rows[step:end, client] = order[: whole * size].reshape(whole, size)
                counts[step:end, client] = size
                if rest:
                    rows[end, client, :rest] = order[whole * size :]
                    counts[end, client] = rest
                step = end + bool(rest)
        self.rows, self.counts = (torch.from_numpy(each).to(device()) for each in (rows, counts))
        self.widths = counts.max(axis=1).tolist()
        self.active = (counts > 0).sum(axis=1).tolist()
        self._places = torch.arange(size, device=device())

    def at(self, step: int, clients: int) -> tuple[Tensor, Tensor]:
        """Return the rows (clients, width) of a step and which of them count."""
        width = self.widths[step]
        counted = self._places[:width] < self.counts[step, :clients, None]
        return self.rows[step, :clients, :width], counted


class GroupTraining:
    """Local training of many clients in one round: `LocalTraining` with a first dimension.

    Args:
        workspace: the model, loaded with x.
        run: the run's settings.
        server_round: the round, from 1.
        clients: the clients, those with the most local steps first.

    Attributes:
        steps: number of local steps done by each.
    """

    def __init__(
        self, workspace: Workspace, run: Run, server_round: int, clients: Sequence[int]
    ) -> None:
        self.workspace = Stack(workspace, len(clients))
        self.run = run
        self.steps = [0] * len(clients)
        self._server_round, self._clients = server_round, clients
        self._problem = workspace.problem
        self._rows = [self._problem.dataset.owners.at(client) for client in clients]
        self._examples_seen = torch.zeros(len(clients), dtype=torch.float64, device=device())
        self._loss_sums, self._targets_seen, self._correct = (
            torch.zeros_like(self._examples_seen) for _ in range(3)
        )
        self._has_labels = True
        self._problem.model.train()

    def descend(self, step: Callable[[], None]) -> None:
        """Compute the gradients of each batch, bound their norm, and call `step` under no_grad."""
        batches = Batches(map(self._orders, self._clients, self._rows), self.run.client.batch_size)
        self.steps = batches.steps
        self._examples_seen += batches.counts.sum(0)
        for number, active in enumerate(batches.active):
            if active < len(self.workspace.parameters[0]):
                self.workspace.activate(active)
            self._clear_gradients()
            rows, counted = batches.at(number, active)
            losses = self._losses(rows, counted)
            means = counted.to(losses.dtype) / batches.counts[number, :active, None]
            (losses * means).sum().backward()
            self._bound_gradients()
            with torch.no_grad():
                step()

    def full_gradient(self, count: bool = True) -> Tensor:
        """Return the gradient of each client's mean loss at x, as vectors (clients, size).

        Their norms are bounded as a batch's are.

        Args:
            count: whether this is the training itself, and enters the train metrics.
        """
        self._clear_gradients()
        batches = Batches([[rows] for rows in self._rows], self.run.client.batch_size)
        clients = len(self._rows)
        examples = batches.counts.sum(0)
        if count:
            self._examples_seen += examples
        for number in range(len(batches.active)):
            rows, counted = batches.at(number, clients)
            losses = self._losses(rows, counted, count)
            means = counted.to(losses.dtype) / examples[:, None]
            (losses * means).sum().backward()
        self._bound_gradients()
        gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad
            for each in self.workspace.parameters
        ]
        return torch.cat([each.reshape(clients, -1) for each in gradients], dim=1)

    def active(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return what belongs to the clients that take the present step."""
        return [each[: len(self.workspace.parameters[0])] for each in tensors]

    def metrics(self) -> list[dict[str, float]]:
        """Return each client's examples and its means over every example visited."""
        means = {"train-loss": self._loss_sums / self._examples_seen}
        if self._has_labels:
            several = self._problem.dataset.has_sequences
            targets = self._targets_seen if several else self._examples_seen
            means["train-accuracy"] = self._correct / targets.clamp(min=1)
        read = torch.stack(list(means.values()), dim=1).tolist()
        return [
            {"num-examples": len(rows), **dict(zip(means, values, strict=True))}
            for rows, values in zip(self._rows, read, strict=True)
        ]

    def _bound_gradients(self) -> None:
        """Scale each client's gradient as `clip_grad_norm_` does."""
        bound = self.run.client.max_grad_norm
        if bound is None:
            return
        gradients = [each.grad for each in self.workspace.parameters if each.grad is not None]
        norms = [torch.linalg.vector_norm(each.reshape(len(each), -1), dim=1) for each in gradients]
        factors = bound / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)
        for each in gradients:
            each.mul_(factors.clamp(max=1.0).view(-1, *[1] * (each.ndim - 1)))

    def _clear_gradients(self) -> None:
        for parameter in self.workspace.parameters:
            parameter.grad = None

    def _losses(self, rows: Tensor, counted: Tensor, count: bool = True) -> Tensor:
        """Return the loss of each row, (k, rows); what does not count is there and no more."""
        inputs, targets = self._problem.dataset.batch(rows)
        outputs, losses = losses_as_one(self._problem, self.workspace.parameters, inputs, targets)
        if count:
            flat = targets.flatten(0, 1)
            right = correct_by_row(outputs, flat)
            self._has_labels &= right is not None
            for sums, values in (
                (self._loss_sums, losses.detach()),
                (self._correct, right),
                (self._targets_seen, targets_by_row(flat)),
            ):
                if values is not None:
                    sums[: len(counted)] += (values.view(counted.shape) * counted).sum(1)
        return losses

    def _orders(self, client: int, rows: np.ndarray) -> list[np.ndarray]:
        _, orders = draw_orders(self.run, self._server_round, client, rows)
        return list(orders)


def losses_as_one(
    problem: Problem, parameters: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return k clients' outputs (k * n, ...) and losses (k, n), each under its own parameters.

    Args:
        problem: model and loss.
        parameters: the trainable arrays (k, ...), in the layout's order.
        inputs, targets: n rows of each client, (k, n, ...).
    """

    def outputs_of_one(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(problem.model, parameters, (inputs,))

    named = dict(zip(problem.layout.trainable, parameters, strict=True))
    outputs = vmap(outputs_of_one)(named, inputs).flatten(0, 1)
    flat = targets.flatten(0, 1)  # a loss is of each row alone: it need not know of the clients
    losses = per_example(problem.loss(outputs, flat), flat)
    return outputs, losses.view(targets.shape[:2])
