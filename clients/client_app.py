"""The Flower ClientApp: message -> local training -> reply, and evaluation.

It keeps Flower's convention (`arrays` and `config` in; `arrays` and `metrics` with `num-examples`
out), so it serves any Flower strategy; and it runs under RayGrid and under Flower's own runtime.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.client_optimizers import (
    CLIENT_OPTIMIZERS,
    OBEY_PROXIMAL_MU,
    ClientOptimizer,
    OptimizerFactory,
    ServerState,
    per_client,
)
from clients.local_training import LocalDraws, Workspace
from clients.memory_format import MEMORY_FORMATS
from clients.vectorized import groups, make_training
from fedinit.cohort import ARRAYS, METRICS, Trained, TrainGroup, array_records
from fedinit.config import Run
from fedinit.measurements.evaluation import evaluate
from fedinit.problem import Problem

CONFIG, SERVER_STATE = "config", "server-state"
PROXIMAL_MU = "proximal-mu"  # in the config that Flower's FedProx sends
_EVALUATION_BATCH = 128


class LocalClientApp(ClientApp):
    """A ClientApp whose training can also be had without a message.

    RayGrid's workers ask it directly: what Flower needs for a message, the records and their
    checks, is a tenth of a small client's update; and clients of one share can be trained as one.

    Attributes:
        deal_training: see `TrainsGroups`; the clients of a group are trained as one.
    """

    def __init__(
        self,
        deal_training: Callable[[RecordDict, Sequence[int]], tuple[list[list[int]], TrainGroup]],
    ) -> None:
        super().__init__()
        self.deal_training = deal_training


def make_client_app(run: Run, problem: Problem, base_optimizer: OptimizerFactory) -> LocalClientApp:
    """Build the ClientApp of a run. It keeps one model, reset in place for each message.

    Args:
        run: the run's settings.
        problem: data set, model and loss, as the run names them.
        base_optimizer: the server's optimizer at the client's rate, for mimelite.

    Returns:
        An app that answers `train`; `evaluate`, on the client's own rows; and `evaluate.test`, on
        part `config["part"]` of `config["parts"]` of the test set. The client of a message is its
        context's `partition-id`. A `proximal-mu` in a train message's config, as Flower's FedProx
        has it, is mu of sgd and proximal clients.
    """
    # `auto` is settled before RayGrid's workers start; Flower's runtime has nobody to settle it.
    memory_format = MEMORY_FORMATS.get(run.memory_format, torch.contiguous_format)
    workspace = Workspace(problem, memory_format)
    problem = workspace.problem
    # The scores of a sequence are one for each token and word: hundreds of megabytes for 128 rows.
    size = run.client.batch_size if problem.dataset.has_sequences else _EVALUATION_BATCH

    @cache
    def told(proximal_mu: float | None) -> tuple[Run, ClientOptimizer]:
        """Return the run as a strategy wants it, and its client optimizer."""
        if proximal_mu is None or run.client.optimizer not in OBEY_PROXIMAL_MU:
            return run, CLIENT_OPTIMIZERS[run.client.optimizer]
        client = run.client.model_copy(update={"optimizer": "proximal", "mu": proximal_mu})
        return run.model_copy(update={"client": client}), CLIENT_OPTIMIZERS["proximal"]

    def deal_training(
        content: RecordDict, clients: Sequence[int]
    ) -> tuple[list[list[int]], TrainGroup]:
        config = _config(content)
        server_round, mu = int(config["server-round"]), config.get(PROXIMAL_MU)  # type: ignore[arg-type]
        as_told, client_optimizer = told(None if mu is None else float(mu))  # type: ignore[arg-type]
        state = content.get(SERVER_STATE)
        server = ServerState(base_optimizer, state) if isinstance(state, ArrayRecord) else None
        arrays = array_records(content)[ARRAYS]
        owners = problem.dataset.owners
        dealt = groups(run, owners.sizes, server_round, clients)
        # Made one by one, between trainings that fill the caches, they take five times as long.
        ahead = {
            first: LocalDraws.of(as_told, server_round, first, owners.at(first))
            for first, *others in dealt
            if not others
        }

        def train_group(group: Sequence[int]) -> list[Trained]:
            workspace.load(arrays)
            draws = ahead.pop(group[0], None)
            training = make_training(workspace, as_told, server_round, group, draws)
            return per_client(training, client_optimizer(training, server), workspace.rest())

        return dealt, train_group

    app = LocalClientApp(deal_training)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        [group], train_group = deal_training(message.content, [_client(context)])
        [trained] = train_group(group)
        content = trained.content(problem.layout, array_records(message.content)[ARRAYS])
        return Message(content, reply_to=message)

    def evaluated(message: Message, batches: Iterator[tuple[Tensor, Tensor]]) -> Message:
        workspace.load(message.content[ARRAYS])  # type: ignore[arg-type]
        metrics = MetricRecord(dict(evaluate(problem.model, problem.loss, batches)))
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    @app.evaluate()
    def evaluate_client(message: Message, context: Context) -> Message:
        rows = problem.dataset.owners.at(_client(context))
        return evaluated(
            message,
            (problem.dataset.batch(rows[at : at + size]) for at in range(0, len(rows), size)),
        )

    @app.evaluate("test")
    def evaluate_test(message: Message, _context: Context) -> Message:
        config: ConfigRecord = message.content[CONFIG]  # type: ignore[assignment]
        rows = problem.dataset.test_size
        part, parts = int(config["part"]), int(config["parts"])  # type: ignore[arg-type]
        first, last = rows * part // parts, rows * (part + 1) // parts
        return evaluated(
            message,
            (
                problem.dataset.test_batch(at, min(at + size, last))
                for at in range(first, last, size)
            ),
        )

    return app


def _config(content: RecordDict) -> ConfigRecord:
    """Return a train message's config."""
    config = content.get(CONFIG)
    if not isinstance(config, ConfigRecord) or "server-round" not in config:
        raise ValueError("the message's config has no 'server-round', which keys the shuffles")
    return config


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])
