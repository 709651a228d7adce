"""RayGrid against the floor: a bare PyTorch loop that does the same rounds in two processes.

    python -m experiments.floor [ROUNDS]

The work is 1,000 clients of 20 images 28x28x1 in 62 classes, a CNN of 118k parameters, a cohort of
100, one local epoch of one batch. The loop is two processes of one thread: each trains its half of
the cohort, one client after another, on a kept model with flat buffers, and sums in shared memory.
Rounds of the two are interleaved; what counts is their ratio.
"""

import statistics
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import torch
from flwr.app import ConfigRecord
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing
from torch.nn import functional

from experiments.wiring import Datasets, simulation
from fedinit.config import make_run
from fedinit.data import FederatedDataset
from fedinit.models.vision import cnn
from fedinit.simulation import Workers

CLIENTS, EXAMPLES, CLASSES, SHAPE, COHORT, LR = 1000, 20, 62, (1, 28, 28), 100, 0.05
PROCESSES = 2


def images() -> FederatedDataset:
    """Seeded noise in the shape of the work."""
    generator = torch.Generator().manual_seed(0)
    rows = CLIENTS * EXAMPLES
    inputs = torch.rand((rows, *SHAPE), generator=generator)
    targets = torch.randint(CLASSES, (rows,), generator=generator)
    clients = {
        f"{client:04d}": range(client * EXAMPLES, (client + 1) * EXAMPLES)
        for client in range(CLIENTS)
    }
    return FederatedDataset(inputs, targets, clients, inputs[:100], targets[:100], CLASSES)


class BareLoop:
    """FedAvg with nothing around it."""

    def __init__(self) -> None:
        model = cnn(CLASSES, SHAPE)
        size = sum(each.numel() for each in model.parameters())
        self.x = torch.nn.utils.parameters_to_vector(model.parameters()).detach().share_memory_()
        self.sums = torch.zeros(PROCESSES, size).share_memory_()
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(PROCESSES + 1)
        self._pipes = []
        for index in range(PROCESSES):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._barrier, self.x, self.sums[index])
            context.Process(target=_bare_worker, args=arguments, daemon=True).start()
            self._pipes.append(ours)

    def round(self, cohort: list[int]) -> None:
        """Train a cohort of equal clients and average."""
        for index, pipe in enumerate(self._pipes):
            pipe.send(cohort[index::PROCESSES])
        self._barrier.wait()
        self.x.copy_(self.sums.sum(0) / len(cohort))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)


def _bare_worker(pipe: Connection, barrier: Barrier, x: Tensor, total: Tensor) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data, model = images(), cnn(CLASSES, SHAPE)
    parameters: list[Tensor] = list(model.parameters())
    flat = x.clone()
    views = flat.split([each.numel() for each in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view.view_as(parameter)
    while (share := pipe.recv()) is not None:
        total.zero_()
        for client in share:
            flat.copy_(x)
            rows = client * EXAMPLES + torch.randperm(EXAMPLES)
            loss = functional.cross_entropy(model(data.inputs[rows]), data.targets[rows])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-LR)
            total.add_(flat)
        barrier.wait()


def main(rounds: int) -> None:
    """Print seconds for a round of each, and the ratio."""
    settings = {
        "dataset": "experiments.floor:images",
        "model": "cnn",
        "client": {"lr": LR, "batch_size": EXAMPLES},
        "cohort": COHORT,
        "workers": PROCESSES,
    }
    datasets = Datasets()
    prepared = simulation(make_run(settings), datasets)
    strategy, arrays = prepared.strategy, prepared.arrays
    seconds: dict[str, list[float]] = {"bare loop": [], "RayGrid": []}
    with Workers(PROCESSES) as workers:
        prepared = prepared.settled(workers, datasets)
        grid, loop = prepared.grid(workers, datasets), BareLoop()
        for number in range(1, rounds + 2):
            begun = time.perf_counter()
            messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
            replies = grid.send_and_receive(messages)
            arrays, _ = strategy.aggregate_train(number, replies)  # type: ignore[assignment]
            grid.take_sums()
            middle = time.perf_counter()
            loop.round([message.metadata.dst_node_id for message in messages])
            end = time.perf_counter()
            if number > 1:  # the first round warms both up
                seconds["RayGrid"].append(middle - begun)
                seconds["bare loop"].append(end - middle)
        loop.close()
    table = Table("", "median s/round", "fastest", title=f"{rounds} interleaved rounds")
    for name, each in seconds.items():
        table.add_row(name, f"{statistics.median(each):.3f}", f"{min(each):.3f}")
    ratios = [ours / bare for ours, bare in zip(*reversed(seconds.values()), strict=True)]
    console = Console()
    console.print(table)
    console.print(
        f"RayGrid / bare loop, median of the rounds' ratios: {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
