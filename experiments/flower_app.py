"""The Flower apps of `flwr run .`: one run, under Flower's own Simulation Runtime.

The run is named by `experiment` in the run config, a file or a name as for `fedinit run`, with
`settings`, overrides separated by `;`. The data and weights come from the installed package or by
path: Flower's bundle holds neither.
"""

import time
from functools import cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from experiments.cli import find_experiment
from experiments.running import execute
from experiments.wiring import Datasets, Simulation, client_app, simulation
from fedinit.errors import RequestError, located
from fedinit.experiment_file import Experiment, load_experiment
from fedinit.registry import add_to_path
from fedinit.results import RunFolder, summarize
from fedinit.simulation.failures import Failures
from fedinit.simulation.observed_grid import ObservedGrid

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run and write its results folder, as `fedinit run` does."""
    prepared = _simulation(*_request(context))
    out = Path(str(context.run_config["out"]))
    folder = RunFolder(out / "run")
    if not out.is_absolute() or folder.path.exists():
        raise RequestError(f"out: expected the absolute path of a new folder, got '{out}'")
    skip = prepared.run.on_client_error == "skip"
    observed = ObservedGrid(grid, prepared.problem.layout, Failures(skip))
    _wait_for_nodes(grid, prepared.clients)
    try:
        execute(prepared, observed, folder, lambda _line: None)  # Flower logs each round
    except Exception as error:
        folder.fail(located(error))
        raise
    finally:
        summarize(out, Experiment(name="run", folder=out, varied=[], runs={"run": prepared.run}))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    return _client_app(*_request(context))(message, context)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on one client's rows."""
    return _client_app(*_request(context))(message, context)


@client.evaluate("test")
def evaluate_test(message: Message, context: Context) -> Message:
    """Evaluate on a part of the test set."""
    return _client_app(*_request(context))(message, context)


def _wait_for_nodes(grid: Grid, clients: int, seconds: float = 60) -> None:
    """Wait until the runtime has registered a node for each client; it starts before that."""
    deadline = time.monotonic() + seconds
    while (found := len(list(grid.get_node_ids()))) != clients:
        if time.monotonic() > deadline:
            raise RequestError(
                f"the run has {clients} clients: num-supernodes={clients}, not {found}"
            )
        time.sleep(0.2)


def _request(context: Context) -> tuple[str, str]:
    return str(context.run_config["experiment"]), str(context.run_config["settings"])


@cache  # once in each of the runtime's processes
def _simulation(experiment: str, settings: str) -> Simulation:
    torch.set_num_threads(1)
    overrides = [each.strip() for each in settings.split(";") if each.strip()]
    loaded = load_experiment(find_experiment(experiment), overrides)
    if len(loaded.runs) != 1:
        raise RequestError(
            f"{experiment}: flwr run carries out one run, this file asks for several"
        )
    add_to_path([str(loaded.folder)])
    (run,) = loaded.runs.values()
    return simulation(run, Datasets())


@cache
def _client_app(experiment: str, settings: str) -> ClientApp:
    prepared = _simulation(experiment, settings)
    return client_app(prepared.run, prepared.problem)
