"""A run in pfl-research (Granqvist et al. 2024), timed round by round; in processes of its own.

Model, loss, data, cohorts and rates are the run's, and no other setting, as in the bare loop; what
is around them is pfl's, as it comes.
"""

import json
import sys
import time
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from experiments.wiring import Datasets, simulation
from fedinit.config import Run
from fedinit.experiment_file import load_experiment
from fedinit.problem import Problem
from strategies.fedopt import draw_cohort


class _WithLoss(nn.Module):
    """The problem as pfl asks for it: `loss` and `metrics` of a batch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.model.train()
        self._loss = problem.loss

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(self.model(inputs), targets).mean()

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Weighted]:
        with torch.no_grad():
            loss = self.loss(inputs, targets).item()
        return {"loss": Weighted(loss * len(targets), len(targets))}


class _Clock(TrainingProcessCallback):
    """Notes the seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
        return False, Metrics()


def train(run: Run, problem: Problem) -> list[float]:
    """Train a run's model by federated averaging; return the seconds of its rounds."""
    data, settings = problem.dataset, run.client
    rng = np.random.default_rng(run.seed)

    def client(index: int) -> PyTorchTensorDataset:
        return PyTorchTensorDataset(data.batch(rng.permutation(data.owners.at(index))))

    cohorts = chain.from_iterable(
        draw_cohort(run.seed, each, len(data.owners), run.cohort) for each in count(1)
    )
    clients = FederatedDataset(client, partial(next, cohorts))
    module, clock = _WithLoss(problem), _Clock()
    server = torch.optim.SGD(module.parameters(), lr=run.server.lr)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=run.rounds,
            evaluation_frequency=run.rounds,  # and in the first round, which is not timed
            train_cohort_size=run.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(module, torch.optim.SGD, server),
        NNTrainHyperParams(
            local_batch_size=settings.batch_size,
            local_num_epochs=settings.epochs,
            local_learning_rate=settings.lr,
        ),
        NNEvalHyperParams(local_batch_size=settings.batch_size),
        [clock],
        send_metrics_to_platform=False,
    )
    return clock.seconds


def main(path: str) -> None:
    """Carry out the run of a file; the first of the processes prints its rounds' seconds."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    (run,) = load_experiment(Path(path)).runs.values()
    seconds = train(run, simulation(run, Datasets()).problem)
    if pytorch_ops.distributed.global_rank == 0:
        print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main(sys.argv[1])
