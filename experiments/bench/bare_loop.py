"""The floor: local SGD and averaging with nothing around them, in bare PyTorch.

A process of one thread for each worker; each trains its part of the cohort, one client after
another, on a kept model whose parameters are views of one vector, on the GPU if there is one, and
sums in shared memory.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import psutil
import torch
from torch import Tensor, multiprocessing

from clients.memory_format import MEMORY_FORMATS
from experiments.unread import reads
from fedinit import simulation
from fedinit.config import Run, dotted_keys, get, make_run
from fedinit.data import FederatedDataset
from fedinit.device import device
from fedinit.problem import Problem, build_problem

# What the loop does likewise; it always shuffles, which costs nothing.
_ALIKE = ("client.lr", "client.epochs", "client.batch_size", "client.shuffle")
_METHOD = ("client.", "server.", "stragglers.", "strategy")
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def loop_leaves_out(run: Run) -> dict[str, Any]:
    """Return those of a run's settings, by their keys, that make it more than the loop does."""
    plain = make_run({"dataset": run.dataset, "model": run.model})
    keys = [key for key in dotted_keys() if key.startswith(_METHOD) and key not in _ALIKE]
    more = {key: get(run, key) for key in keys if reads(run, key)}
    more = {key: value for key, value in more.items() if value != get(plain, key)}
    return more | ({"reduce": "client"} if run.reduce == "client" else {})


class BareLoop:
    """FedAvg by `processes` processes; every batch and the rate of the run, and no more.

    Args:
        run: the run; its memory format is settled.
        problem: its data and model.
        processes: how many.
        environment: variables that the processes start with.

    Attributes:
        x: the weights as one vector, in memory that the processes share.
    """

    def __init__(
        self, run: Run, problem: Problem, processes: int, environment: dict[str, str] | None = None
    ) -> None:
        self.processes: list[psutil.Process] = []
        self._sizes = problem.dataset.owners.sizes
        size = sum(problem.layout.sizes)
        self.x = torch.zeros(size).share_memory_()
        self._sums = torch.zeros(processes, size).share_memory_()
        context = multiprocessing.get_context("spawn")
        # Made before the processes: it starts multiprocessing's tracker, which unblocks Ctrl-C.
        self._barrier = context.Barrier(processes + 1)
        self._pipes: list[Connection] = []
        data = problem.dataset
        columns = (data.inputs, data.targets, data.test_inputs, data.test_targets)
        # As tensors, in shared memory: starting is short, and a stop hardly finds it under way.
        owned = torch.from_numpy(data.owners.rows), torch.from_numpy(data.owners.offsets)
        try:
            with simulation.environment(environment or {}), _ctrl_c_is_ours():
                for index in range(processes):
                    ours, theirs = context.Pipe()
                    arguments = (theirs, self._barrier, self.x, self._sums[index], run, columns)
                    process = context.Process(target=_work, args=(*arguments, *owned), daemon=True)
                    process.start()
                    self.processes.append(psutil.Process(process.pid))
                    self._pipes.append(ours)
            self.x.copy_(self._pipes[0].recv())
            for pipe in self._pipes[1:]:
                pipe.recv()
        except BaseException:
            self.close()
            raise

    def round(self, cohort: Sequence[int]) -> None:
        """Train a cohort, dealt by the clients' sizes, and average by them."""
        sizes = self._sizes[list(cohort)]
        for pipe, share in zip(
            self._pipes, simulation.assign(sizes.tolist(), len(self._pipes)), strict=True
        ):
            pipe.send([cohort[index] for index in share])
        self._barrier.wait()
        self.x.copy_(self._sums.sum(0).div_(int(sizes.sum())))

    def close(self) -> None:
        """End the processes."""
        for each in self.processes:
            each.kill()  # in mid-round too, after Ctrl-C: there is nothing to keep
        psutil.wait_procs(self.processes)


@contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """Have no process that is started meanwhile take Ctrl-C, from its first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    pipe: Connection,
    barrier: Barrier,
    x: Tensor,
    total: Tensor,
    run: Run,
    columns: Columns,
    rows: Tensor,
    offsets: Tensor,
) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    problem = build_problem(run, FederatedDataset(*columns[:2], None, *columns[2:])).on(device())
    model, data, size = problem.model.train(), problem.dataset, run.client.batch_size
    model.to(memory_format=MEMORY_FORMATS.get(run.memory_format, torch.contiguous_format))
    parameters: list[Tensor] = [each for each in model.parameters() if each.requires_grad]
    flat = _flat(parameters)
    pipe.send(flat.cpu())
    sums = total if flat.is_cpu else torch.zeros_like(flat)
    while True:
        share = pipe.recv()
        sums.zero_()
        for client in share:
            flat.copy_(x)
            own = rows[offsets[client] : offsets[client + 1]]
            for _ in range(run.client.epochs):
                order = own[torch.randperm(len(own))]
                for batch in order.split(size):
                    inputs, targets = data.batch(batch.numpy())
                    loss = problem.loss(model(inputs), targets).mean()
                    gradients = torch.autograd.grad(loss, parameters)
                    with torch.no_grad():
                        torch._foreach_add_(parameters, gradients, alpha=-run.client.lr)
            sums.add_(flat, alpha=len(own))
        total.copy_(sums)
        barrier.wait()


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    """Make the parameters views of one vector, each as it lies in memory, and return the vector."""
    flat = torch.cat([each.detach().as_strided((each.numel(),), (1,)) for each in parameters])
    parts = flat.split([each.numel() for each in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.as_strided(parameter.shape, parameter.stride())
    return flat
