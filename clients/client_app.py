"""The Flower ClientApp: message -> local training -> reply, and evaluation.

It keeps Flower's convention (`arrays` and `config` in; `arrays` and `metrics` with `num-examples`
out), so it serves any Flower strategy; and it runs under RayGrid and under Flower's own runtime.
"""

from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.client_optimizers import CLIENT_OPTIMIZERS, OptimizerFactory, ServerState
from clients.local_training import LocalTraining, Workspace
from clients.memory_format import MEMORY_FORMATS
from fedinit.cohort import ARRAYS, METRICS
from fedinit.config import Run
from fedinit.measurements.evaluation import evaluate
from fedinit.problem import Problem

CONFIG, SERVER_STATE = "config", "server-state"
_EVALUATION_BATCH = 128


def make_client_app(run: Run, problem: Problem, base_optimizer: OptimizerFactory) -> ClientApp:
    """Build the ClientApp of a run. It keeps one model, reset in place for each message.

    Args:
        run: the run's settings.
        problem: data set, model and loss.
        base_optimizer: the server's optimizer at the client's rate, for mimelite.

    Returns:
        An app that answers `train`; `evaluate`, on the client's own rows; and `evaluate.test`, on
        part `config["part"]` of `config["parts"]` of the test set. The client of a message is its
        context's `partition-id`.
    """
    app = ClientApp()
    # `auto` is settled before RayGrid's workers start; Flower's runtime has nobody to settle it.
    memory_format = MEMORY_FORMATS.get(run.memory_format, torch.contiguous_format)
    workspace = Workspace(problem, memory_format)
    # The scores of a sequence are one for each token and word: hundreds of megabytes for 128 rows.
    size = run.client.batch_size if problem.dataset.has_sequences else _EVALUATION_BATCH
    client_optimizer = CLIENT_OPTIMIZERS[run.client.optimizer]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        workspace.load(message.content[ARRAYS])  # type: ignore[arg-type]
        config = _config(message)
        if "server-round" not in config:
            raise ValueError("the message's config has no 'server-round', which keys the shuffles")
        training = LocalTraining(workspace, run, int(config["server-round"]), _client(context))
        state = message.content.array_records.get(SERVER_STATE)
        server = None if state is None else ServerState(base_optimizer, state)
        update = client_optimizer(training, server)
        metrics = MetricRecord({**training.metrics(), **update.metrics})
        content = RecordDict({ARRAYS: workspace.record(update.weights), METRICS: metrics})
        content.update(update.extra)
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
        config, rows = _config(message), problem.dataset.test_size
        part, parts = int(config["part"]), int(config["parts"])
        first, last = rows * part // parts, rows * (part + 1) // parts
        return evaluated(
            message,
            (
                problem.dataset.test_batch(at, min(at + size, last))
                for at in range(first, last, size)
            ),
        )

    return app


def _config(message: Message) -> dict[str, Any]:
    return dict(message.content.config_records.get(CONFIG, ConfigRecord()))


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])
