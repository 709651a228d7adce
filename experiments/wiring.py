"""From a run's settings to the parts that carry it out, every one of them checked on the way."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import Strategy

from clients import CLIENT_OPTIMIZERS, make_client_app
from clients.client_optimizers import NEED_FEDOPT, OBEY_PROXIMAL_MU
from clients.local_training import local_steps
from clients.memory_format import MEMORY_FORMATS, fastest_memory_format, has_images
from clients.together import fastest_together
from experiments.trying_out import check_batches, try_out
from fedinit import initialization
from fedinit.config import Run
from fedinit.data import FederatedDataset, partitioned, with_validation
from fedinit.device import device
from fedinit.errors import RequestError, unknown
from fedinit.initialization import Initialization, Weights
from fedinit.pretraining import proxy_path
from fedinit.problem import Problem, build_problem, find_model, label_space, load_dataset
from fedinit.registry import call, resolve
from fedinit.simulation import Failures, RayGrid, Workers
from strategies import SERVER_OPTIMIZERS, FedOpt

SETTLED = ("memory_format", "together")  # settings that a measurement replaces at the start
STRATEGIES: dict[str, Callable[..., Strategy]] = {"fedopt": FedOpt}
# Flower's own that look at each client's update.
_NO_MEAN = (
    flowers.Bulyan,
    flowers.DifferentialPrivacyServerSideAdaptiveClipping,
    flowers.DifferentialPrivacyServerSideFixedClipping,
    flowers.FedMedian,
    flowers.FedTrimmedAvg,
    flowers.MultiKrum,  # and Krum
    flowers.QFedAvg,
)


class Datasets:
    """Data sets by what names them, loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, FederatedDataset] = {}

    def load(self, run: Run) -> FederatedDataset:
        """Return a run's data set, not partitioned."""
        key = self.key(run)
        if key not in self._loaded:
            self._loaded[key] = load_dataset(run)
        return self._loaded[key]

    def dealt(self, run: Run) -> FederatedDataset:
        """Return a run's data set, dealt to its clients, without what it holds out of them.

        Raises:
            RequestError: the data are missing or corrupt, or cannot be dealt so.
        """
        dealt = partitioned(self.load(run), run.partition, run.seed)
        return with_validation(dealt, run.validation, run.seed)

    @staticmethod
    def key(run: Run) -> str:
        """Return what names a run's data set."""
        return json.dumps([run.dataset, run.dataset_args], sort_keys=True, default=str)


@dataclass(frozen=True)
class Simulation:
    """A run, ready to start: what clients optimize, where from, and the strategy."""

    run: Run
    problem: Problem
    arrays: ArrayRecord
    initialization: Initialization
    strategy: Strategy

    @property
    def clients(self) -> int:
        """Number of virtual clients."""
        return len(self.problem.dataset.owners)

    @property
    def failures(self) -> Failures:
        """What becomes of a client's exception, by the run's settings."""
        skip = self.run.on_client_error == "skip"
        return Failures(skip, self.problem.dataset.owners.ids)

    def settled(self, workers: Workers, datasets: Datasets) -> "Simulation":
        """Return this run with each `auto` of `SETTLED` replaced by what a worker measured.

        Measured once for each model, loss, shape of rows and batch size: arms of a pair agree.
        """
        run = self.run
        work = [*measured_work(run), tuple(self.problem.dataset.inputs.shape[1:])]

        def measured(run: Run, name: str, function: Callable[..., Any], *key: Any) -> Run:
            text = json.dumps([name, *work, *key], sort_keys=True, default=str)
            shipped = self._shipped(workers, datasets)[1:]
            found = workers.measure(text, partial(function, run, *key, *shipped))
            return run.model_copy(update={name: found})

        if run.memory_format == "auto" and has_images(self.problem.model):
            run = measured(run, "memory_format", _memory_format)
        elif run.memory_format == "auto":
            run = run.model_copy(update={"memory_format": "contiguous"})
        if run.together == "auto":
            share = -(-run.cohort // workers.number)
            run = measured(run, "together", _together, share)
        return replace(self, run=run)

    def grid(self, workers: Workers, datasets: Datasets) -> RayGrid:
        """Build the grid of this run on the given workers."""
        return RayGrid(
            workers,
            partial(_worker_app, *self._shipped(workers, datasets)),
            self.clients,
            self.problem.layout,
            self._reduction(),
            expected_work=self._expected_work,
            failures=self.failures,
        )

    def _shipped(
        self, workers: Workers, datasets: Datasets
    ) -> tuple[Run, ray.ObjectRef, ray.ObjectRef]:
        """Return what a worker builds this run's problem from."""
        dealt = self.problem.dataset
        stored = workers.store(datasets.key(self.run), lambda: datasets.load(self.run))
        return self.run, stored, ray.put((dealt.owners, dealt.held_out))

    def _reduction(self) -> torch.dtype | None:
        """The dtype of the workers' means: Flower's strategies expect the model's own."""
        ours = getattr(self.strategy, "reduces_in_worker", False)
        if self.run.reduce == "client" or (self.run.reduce == "auto" and not ours):
            return None
        return torch.float64 if ours else self.problem.layout.flatten(self.arrays).dtype

    def _expected_work(self, message: Message) -> float:
        """Local steps of a train message; the other messages are alike."""
        config = message.content.get("config")
        server_round = config.get("server-round") if isinstance(config, ConfigRecord) else None
        if message.metadata.message_type != MessageType.TRAIN or not isinstance(server_round, int):
            return 1.0
        client = message.metadata.dst_node_id
        examples = int(self.problem.dataset.owners.sizes[client])
        return local_steps(self.run, examples, server_round, client)


def measured_work(run: Run) -> list[Any]:
    """Return the settings that what is measured for `SETTLED` depends on, but for the data."""
    model = [run.model, run.model_args, run.trainable, run.loss, run.loss_args]
    return [*model, run.client.batch_size, *(getattr(run, name) for name in SETTLED)]


def simulation(run: Run, datasets: Datasets, weights: Weights | None = None) -> Simulation:
    """Build a run's parts, checking everything that can be wrong with the request.

    Args:
        run: the run.
        datasets: where its data set is, or will be.
        weights: to start from, instead of those that it names.

    Raises:
        RequestError: a name is unknown, data or weights are missing, corrupt or do not fit, or
            the sizes are impossible.
    """
    problem = problem_of(run, datasets)
    try_out(run, problem)
    check_batches(run, problem)
    strategy = make_strategy(run, problem)
    if getattr(strategy, "proximal_mu", 0) and run.client.optimizer not in OBEY_PROXIMAL_MU:
        raise RequestError(
            f"client.optimizer: {run.client.optimizer} has no proximal term, which strategy "
            f"'{run.strategy}' asks for; valid: {', '.join(OBEY_PROXIMAL_MU)}"
        )
    if run.client.optimizer in NEED_FEDOPT and not isinstance(strategy, FedOpt):
        raise RequestError(f"client.optimizer: {run.client.optimizer} needs strategy fedopt")
    record = initialize(run, problem, weights)
    return Simulation(run, problem, problem.layout.record_of(problem.model), record, strategy)


def problem_of(run: Run, datasets: Datasets) -> Problem:
    """Build what a run's clients optimize, with random weights.

    Raises:
        RequestError: a name is unknown, the data are missing or corrupt, or sizes are impossible.
    """
    check_methods(run)
    dataset = datasets.dealt(run)
    if run.cohort > len(dataset.owners):
        raise RequestError(f"cohort: {run.cohort} of only {len(dataset.owners)} clients")
    return build_problem(run, dataset)


def check_methods(run: Run) -> None:
    """Check what can be checked of a run without its data.

    Raises:
        RequestError: an optimizer is unknown, or the stragglers' range is reversed.
    """
    for kind, name, known in (
        ("client.optimizer", run.client.optimizer, CLIENT_OPTIMIZERS),
        ("server.optimizer", run.server.optimizer, SERVER_OPTIMIZERS),
    ):
        if name not in known:
            raise unknown(kind, name, known)
    if run.stragglers.epochs[0] > run.stragglers.epochs[1]:
        raise RequestError(f"stragglers.epochs: {list(run.stragglers.epochs)} is not [low, high]")


def initialize(run: Run, problem: Problem, weights: Weights | None = None) -> Initialization:
    """Put a run's initial weights into its model, which holds those of the run's seed.

    Args:
        run: the run.
        problem: its problem.
        weights: to put there, instead of those that the run names.

    Raises:
        RequestError: the initialization is unknown, or its weights are missing or do not fit.
    """
    weights = weights or _weights(run)
    if weights is None:
        return initialization.random(problem.model)
    return initialization.load(
        problem.model,
        weights,
        head=find_model(run.model).head,
        labels=label_space(run, problem.dataset),
        fresh_normalization=run.normalization == "fresh",
    )


def _weights(run: Run) -> Weights | None:
    """Read the weights that a run names; None: it starts from random ones."""
    if run.initialization == "random":
        return None
    if run.initialization == "pretrained":
        spec = find_model(run.model)
        if spec.pretrained is None:
            raise RequestError(
                f"initialization: '{run.model}' has no pretrained weights; valid: random, proxy, a "
                "path to a .safetensors file"
            )
        path = spec.pretrained()
        return Weights.of(path, f"pretrained ({path.name})", spec.labels)
    if run.initialization == "proxy":
        path = proxy_path(run)
        if not path.exists():
            raise RequestError("initialization: this proxy is not trained; fedinit pretrain FILE")
        return Weights.of(path, f"proxy ({run.proxy.dataset}, {path.name})")
    path = Path(run.initialization)
    if not path.suffix:
        choices = ["random", "pretrained", "proxy", "PATH.safetensors"]
        raise unknown("initialization", run.initialization, choices)
    return Weights.of(path)


def make_strategy(run: Run, problem: Problem) -> Strategy:
    """Build a run's strategy; one of Flower's is told the cohort in Flower's own words.

    Raises:
        RequestError: the strategy is unknown, its arguments are wrong, or it is no Flower strategy.
    """
    clients = len(problem.dataset.owners)
    offered: dict[str, Any] = {
        "server_optimizer": partial(_build, run.server.optimizer, settings=run.server),
        "layout": problem.layout,
        "cohort": run.cohort,
        "clients": clients,
        "seed": run.seed,
        "share_state": run.client.optimizer == "mimelite",
        "server_lr": run.server.lr,
        "skip_failed": run.on_client_error == "skip",
        "fraction_train": run.cohort / clients,
        "min_train_nodes": run.cohort,
        "fraction_evaluate": 0.0,
        "min_evaluate_nodes": 0,
        "min_available_nodes": clients,
    }
    strategy = resolve("strategy", run.strategy, STRATEGIES)
    if not inspect.isclass(strategy) or issubclass(strategy, Strategy):
        strategy = call("strategy", strategy, run.strategy_args, **offered)
    if not isinstance(strategy, Strategy):
        of_class = inspect.isclass(strategy)
        kind = f"the class {strategy.__name__}" if of_class else f"a {type(strategy).__name__}"
        raise RequestError(
            f"strategy: '{run.strategy}' is {kind}, expected a flwr.serverapp.strategy.Strategy"
        )
    if run.reduce == "worker" and isinstance(strategy, _NO_MEAN):
        raise RequestError(
            f"reduce: workers average, {type(strategy).__name__} needs each client's reply; valid: "
            "auto, client"
        )
    return strategy


def client_app(run: Run, problem: Problem) -> ClientApp:
    """Build a run's ClientApp."""
    settings = run.server.model_copy(update={"lr": run.client.lr})
    return make_client_app(run, problem, partial(_build, run.server.optimizer, settings=settings))


def _build(name: str, parameters: Sequence[torch.Tensor], settings: Any) -> torch.optim.Optimizer:
    return SERVER_OPTIMIZERS[name](parameters, settings)


def _worker_problem(run: Run, dataset: ray.ObjectRef, clients: ray.ObjectRef) -> Problem:
    return build_problem(run, ray.get(dataset).with_clients(*ray.get(clients)))


def _worker_app(run: Run, *shipped: ray.ObjectRef) -> ClientApp:
    return client_app(run, _worker_problem(run, *shipped))


def _memory_format(run: Run, *shipped: ray.ObjectRef) -> str:
    problem = _worker_problem(run, *shipped).on(device())
    return fastest_memory_format(problem, run.client.batch_size)


def _together(run: Run, share: int, *shipped: ray.ObjectRef) -> int:
    if device().type == "cpu":  # busy with one client as with many
        return 1
    problem = _worker_problem(run, *shipped).on(device())
    return fastest_together(problem, run, MEMORY_FORMATS[run.memory_format], share)
