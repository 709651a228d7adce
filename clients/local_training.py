"""The one training loop, on a model that is kept and reset in place for each client."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import flwr.app
import numpy as np
import torch
from torch import Tensor

from fedinit.config import Run
from fedinit.measurements.evaluation import correct_predictions, count_targets, per_example
from fedinit.problem import Problem
from fedinit.randomness import Draw, keyed, torch_seed


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
    """A process's one model, kept in the memory format that it trains in.

    Args:
        problem: data set, model and loss.
        memory_format: of the model's convolutions; their inputs follow.
    """

    def __init__(self, problem: Problem, memory_format: torch.memory_format) -> None:
        self.problem = problem
        self.layout = problem.layout
        self.start = torch.empty(0)
        self._start_views: list[Tensor] = []
        problem.model.to(memory_format=memory_format)
        parameters = dict(problem.model.named_parameters())
        self.parameters: list[Tensor] = [parameters[name] for name in self.layout.trainable]
        state = problem.model.state_dict()
        self.fixed = {name: state[name] for name in self.layout.fixed}

    def load(self, arrays: flwr.app.ArrayRecord) -> None:
        """Reset the model to received weights x; `start` is x until the next load."""
        start = self.layout.flatten(arrays)
        if start is not self.start:
            self.start, self._start_views = start, self.layout.views(start)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._start_views)
        if self.fixed:
            for name, value in self.layout.rest(arrays).items():
                self.fixed[name].copy_(value)

    def weights(self) -> Tensor:
        """Return a copy of the trainable parameters as one vector."""
        return torch.cat([each.detach().reshape(-1) for each in self.parameters])

    def rest(self) -> dict[str, Tensor]:
        """Return copies of the model's other arrays."""
        return {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in self.fixed.items()
        }


@dataclass
class LocalTraining:
    """One client's local training in one round, from the weights that its workspace holds.

    Attributes:
        workspace: the model, loaded with x.
        run: the run's settings.
        server_round: the round, from 1.
        client: the client's position in the sorted ids.
        steps: number of local steps done.
        examples_seen, targets_seen, loss_sum, correct: sums over every example visited, for the
            train metrics.
    """

    workspace: Workspace
    run: Run
    server_round: int
    client: int
    steps: int = 0
    examples_seen: int = 0
    targets_seen: int = 0
    loss_sum: float = 0.0
    correct: float | None = 0.0
    rows: np.ndarray = field(init=False)
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        problem = self.workspace.problem
        self.rows = problem.dataset.owners.at(self.client)
        self.rng = keyed(Draw.LOCAL_TRAINING, self.run.seed, self.server_round, self.client)
        # Not torch.manual_seed: without a GPU in use that keeps a stack trace for each call.
        torch.default_generator.manual_seed(torch_seed(self.rng))
        if not problem.model.training:
            problem.model.train()

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of each local epoch; the last of an epoch may be small."""
        size = self.run.client.batch_size
        for _ in range(local_epochs(self.run, self.server_round, self.client)):
            rows = self.rng.permutation(self.rows) if self.run.client.shuffle else self.rows
            for first in range(0, len(rows), size):
                yield rows[first : first + size]

    def descend(self, step: Callable[[], None]) -> None:
        """Compute the gradients of each batch, bound their norm, and call `step`."""
        for rows in self.batches():
            self._clear_gradients()
            self._losses(rows).mean().backward()
            self._bound_gradients()
            step()
            self.steps += 1

    def full_gradient(self, count: bool = True) -> Tensor:
        """Return the gradient of the client's mean loss at the current weights, as one vector.

        Its norm is bounded as a batch's is.

        Args:
            count: whether this is the training itself: if not, it leaves no trace in the train
                metrics, in the model's buffers, or in the draws that follow.
        """
        self._clear_gradients()
        size = self.run.client.batch_size
        fixed = {} if count else {name: v.clone() for name, v in self.workspace.fixed.items()}
        with nullcontext() if count else torch.random.fork_rng(devices=[]):
            for first in range(0, len(self.rows), size):
                losses = self._losses(self.rows[first : first + size], count)
                (losses.sum() / len(self.rows)).backward()
        for name, value in fixed.items():
            self.workspace.fixed[name].copy_(value)
        self._bound_gradients()
        gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad
            for each in self.workspace.parameters
        ]
        return torch.cat([each.reshape(-1) for each in gradients])

    def metrics(self) -> dict[str, float]:
        """Return the client's examples and its means over every example visited."""
        means = {"train-loss": self.loss_sum / self.examples_seen}
        if self.correct is not None:
            means["train-accuracy"] = self.correct / self.targets_seen
        return {"num-examples": len(self.rows), **means}

    def _bound_gradients(self) -> None:
        bound = self.run.client.max_grad_norm
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(self.workspace.parameters, bound)

    def _clear_gradients(self) -> None:
        for parameter in self.workspace.parameters:
            parameter.grad = None

    def _losses(self, rows: np.ndarray, count: bool = True) -> Tensor:
        """Return the loss of each row."""
        problem = self.workspace.problem
        inputs, targets = problem.dataset.batch(rows)
        outputs = problem.model(inputs)
        losses = per_example(problem.loss(outputs, targets), targets)
        if count:
            self.examples_seen += len(rows)
            self.targets_seen += count_targets(targets)
            self.loss_sum += losses.detach().sum().item()
            correct = correct_predictions(outputs, targets)
            self.correct = (
                None if correct is None or self.correct is None else self.correct + correct
            )
        return losses
