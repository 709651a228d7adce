"""A run in BlazeFL, timed round by round; in a process of its own.

Model, loss, data, cohorts and clients' rate are the run's, and no other setting, as in the bare
loop; the pool of threads, and how weights get into a model and out of it, are BlazeFL's. What a
client and the server do it leaves to its user: here as in its own FedAvg, but that a thread keeps
its model.
"""

import copy
import json
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from blazefl.core import ThreadPoolClientTrainer, deserialize_model, serialize_model
from torch import Tensor, nn

from experiments.wiring import Datasets, simulation
from fedinit.config import Run
from fedinit.device import device
from fedinit.experiment_file import load_experiment
from fedinit.problem import Problem
from strategies.fedopt import draw_cohort


class _Update(NamedTuple):
    weights: Tensor
    examples: int


class _Clients(ThreadPoolClientTrainer):
    """Local SGD in a pool of threads; the names are BlazeFL's."""

    def __init__(self, run: Run, problem: Problem) -> None:
        threads = 1 if run.workers == "auto" else run.workers
        self.num_parallels, self.device = threads, str(device())
        self.stop_event = threading.Event()
        self.cache: list[_Update] = []
        self._run, self._problem = run, problem
        self._models: SimpleQueue[nn.Module] = SimpleQueue()
        for _ in range(threads):
            self._models.put(copy.deepcopy(problem.model).train())

    def worker(self, cid: int, _device: str, payload: Tensor, _stop: threading.Event) -> _Update:
        settings, data, loss = self._run.client, self._problem.dataset, self._problem.loss
        model = self._models.get()
        try:
            deserialize_model(model, payload)
            optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
            own = torch.from_numpy(data.owners.at(cid))
            for _ in range(settings.epochs):
                for rows in own[torch.randperm(len(own))].split(settings.batch_size):
                    inputs, targets = data.batch(rows.numpy())
                    optimizer.zero_grad()
                    loss(model(inputs), targets).mean().backward()
                    optimizer.step()
            return _Update(serialize_model(model), len(own))
        finally:
            self._models.put(model)


def train(run: Run, problem: Problem) -> list[float]:
    """Train a run's model by federated averaging; return the seconds of its rounds."""
    clients, seconds = _Clients(run, problem), []
    weights = serialize_model(problem.model)
    for server_round in range(1, run.rounds + 1):
        since = time.perf_counter()
        cohort = draw_cohort(run.seed, server_round, len(problem.dataset.owners), run.cohort)
        clients.local_process(weights, cohort)
        updates, clients.cache = clients.cache, []
        examples = sum(each.examples for each in updates)
        weights = torch.zeros_like(weights)
        for each in updates:
            weights.add_(each.weights, alpha=each.examples / examples)
        seconds.append(time.perf_counter() - since)
    deserialize_model(problem.model, weights)
    return seconds


def main(path: str) -> None:
    """Carry out the run of a file, a thread for each worker; print its rounds' seconds."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    (run,) = load_experiment(Path(path)).runs.values()
    seconds = train(run, simulation(run, Datasets()).problem.on(device()))
    print(json.dumps(seconds[1:]))  # the first warms up


if __name__ == "__main__":
    main(sys.argv[1])
