"""What may be a mistake in an experiment that can be carried out: told before it is."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from clients.client_optimizers import NO_LOCAL_STEPS
from experiments.wiring import STRATEGIES
from fedinit.config import Run, Server
from fedinit.experiment_file import Experiment
from fedinit.registry import resolve, taken
from strategies import SERVER_OPTIMIZERS


def notes(experiment: Experiment) -> list[str]:
    """Return a line for each rule that matches no run and each axis that no run reads.

    The runs along such an axis are one run under several names.
    """
    runs = experiment.runs.values()
    unread = [key for key in experiment.varied if not any(reads(run, key) for run in runs)]
    return [*experiment.notes, *(f"grid: no run reads {key}: it changes nothing" for key in unread)]


def reads(run: Run, key: str) -> bool:
    """Whether a run's other settings let a dotted key of a section change anything."""
    section, _, name = key.partition(".")
    if section == "server":
        names = _taken_by(run.strategy)
        steps = "server_optimizer" in names and name in _settings_of(run.server.optimizer)
        return steps or (name == "lr" and "server_lr" in names)
    if section == "proxy":
        return run.initialization == "proxy"
    return _READERS.get(key, lambda _run: True)(run)


@cache
def _settings_of(optimizer: str) -> set[str]:
    """Return which settings a server optimizer reads."""
    read = {"optimizer"}

    class Watched:
        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(Server(), name)

    SERVER_OPTIMIZERS[optimizer]([torch.zeros(1, requires_grad=True)], Watched())  # type: ignore[arg-type]
    return read


@cache
def _taken_by(strategy: str) -> list[str]:
    return taken(resolve("strategy", strategy, STRATEGIES))


def _takes_steps(run: Run) -> bool:
    return run.client.optimizer not in NO_LOCAL_STEPS


def _own_steps(run: Run) -> bool:
    return run.client.optimizer not in ("gd", "mimelite")


_READERS: dict[str, Callable[[Run], bool]] = {
    "partition.alpha": lambda run: run.partition.kind == "dirichlet",
    "partition.clients": lambda run: run.partition.kind != "natural",
    "client.lr": _takes_steps,
    "client.epochs": _takes_steps,
    "client.shuffle": _takes_steps,
    "client.momentum": _own_steps,
    "client.weight_decay": _own_steps,
    "client.mu": lambda run: run.client.optimizer in ("proximal", "nova"),
    "stragglers.fraction": _takes_steps,
    "stragglers.epochs": lambda run: run.stragglers.fraction > 0 and _takes_steps(run),
    "normalization": lambda run: run.initialization != "random",
}
