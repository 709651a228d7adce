"""A run under Flower's own simulation runtime, timed round by round; in a process of its own.

The ClientApp is ours, the strategy is the run's, Flower's FedAvg say. The runtime's processes find
what follows by the module's name, so it is imported and not run as a script.
"""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from experiments.running import train
from experiments.wiring import Datasets, Simulation, client_app, simulation
from fedinit.experiment_file import load_experiment
from fedinit.simulation.observed_grid import ObservedGrid


@cache  # once in each of the runtime's processes
def _simulation(path: str) -> Simulation:
    torch.set_num_threads(1)
    (run,) = load_experiment(Path(path)).runs.values()
    return simulation(run, Datasets())


@cache
def _app(path: str) -> ClientApp:
    prepared = _simulation(path)
    return client_app(prepared.run, prepared.problem)


def main(path: str) -> None:
    """Carry out the run of a file and print the seconds of its rounds, as JSON."""
    prepared, seconds = _simulation(path), []
    server, client = ServerApp(), ClientApp()

    @server.main()
    def serve(grid: Grid, _context: Context) -> None:
        since = time.perf_counter()

        def record(_line: dict[str, Any], _arrays: ArrayRecord) -> None:
            nonlocal since
            seconds.append(time.perf_counter() - since)
            since = time.perf_counter()

        while len(list(grid.get_node_ids())) < prepared.clients:
            time.sleep(0.2)
        train(prepared, ObservedGrid(grid, prepared.problem.layout), record)

    @client.train()
    def train_client(message: Message, context: Context) -> Message:
        return _app(path)(message, context)

    @client.evaluate("test")
    def evaluate(message: Message, context: Context) -> Message:
        return _app(path)(message, context)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    run_simulation(server, client, prepared.clients, backend_config=resources)  # type: ignore[arg-type]
    ray.shutdown()
    print(json.dumps(seconds[2:-1]))  # not the start, the first round, or the one that tests x
