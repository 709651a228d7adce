"""What `fedinit list` shows: every name that an experiment file can use."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from clients import CLIENT_OPTIMIZERS
from clients.client_optimizers import NEED_FEDOPT
from experiments.cli import our_experiments
from experiments.studies import STUDIES
from experiments.wiring import STRATEGIES
from fedinit.data import DATASETS, EMBEDDED, PARTITIONS
from fedinit.models import MODELS
from fedinit.problem import LOSSES
from strategies import SERVER_OPTIMIZERS


def tables() -> Iterator[Table]:
    """Yield a table for each kind of name."""
    yield _table("dataset", {name: (_about(each), source(name)) for name, each in DATASETS.items()})
    yield _table(
        "model",
        {name: (_about(each.build), each.weights) for name, each in MODELS.items()},
        third="pretrained weights",
    )
    yield _table(
        "initialization",
        {
            "random": ("the run's seed", "nothing"),
            "pretrained": (
                "the model's published weights; a fresh head where labels differ",
                "a model with pretrained weights",
            ),
            "proxy": ("weights that fedinit trains on other data first", "proxy.dataset"),
            "PATH.safetensors": (
                "weights of your own, by state-dict name",
                "names and shapes that fit",
            ),
        },
    )
    yield _table("partition.kind", {name: (_about(each), "") for name, each in PARTITIONS.items()})
    yield _table(
        "client.optimizer",
        {
            name: (_about(each), "strategy fedopt" if name in NEED_FEDOPT else "")
            for name, each in CLIENT_OPTIMIZERS.items()
        },
    )
    yield _table(
        "server.optimizer", {name: (_about(each), "") for name, each in SERVER_OPTIMIZERS.items()}
    )
    yield _table(
        "strategy",
        {name: (_about(each), "") for name, each in STRATEGIES.items()}
        | {
            "package.module:Class": (
                "any Flower strategy, e.g. flwr.serverapp.strategy:FedMedian",
                "",
            )
        },
    )
    yield _table("loss", {name: (_about(each), "integer targets") for name, each in LOSSES.items()})
    yield _table("study", {name: (_about_module(each), "") for name, each in STUDIES.items()})
    yield _table(
        "experiment", {name: (_first_comment(file), "") for name, file in our_experiments().items()}
    )


def _table(kind: str, rows: dict[str, tuple[str, str]], third: str = "needs") -> Table:
    table = Table(title=kind, title_justify="left", title_style="bold", min_width=80)
    for heading in ("name", "what", third):
        table.add_column(heading, overflow="fold")
    for name, (what, needs) in rows.items():
        table.add_row(name, what, needs)
    return table


def _about(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def source(dataset: str) -> str:
    """Say where a data set of ours is read from."""
    return "embedded" if dataset in EMBEDDED else "its files in data_dir, or the network"


def _about_module(function: Callable[..., Any]) -> str:
    return (sys.modules[function.__module__].__doc__ or "").splitlines()[0]


def _first_comment(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
