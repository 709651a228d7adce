"""A strategy in mid-run: what it says of a round, its rounds counted on, its state saved."""

from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedinit.checkpoints import UnsavableError
from fedinit.parameters import Layout

_MADE_ANEW = (
    *(FunctionType, BuiltinFunctionType, MethodType, partial, type, Layout),
    *(np.ufunc, type(np.mean)),  # NumPy's functions
)


class Continued(Strategy):
    """Another strategy from round `done` + 1 on: Flower's `start` counts from 1.

    Args:
        strategy: a `start` of its own, if it has one, is not called.
        done: number of rounds that are done.

    Attributes:
        trained, evaluated: its metrics of the last round's training, and of its evaluation.
    """

    def __init__(self, strategy: Strategy, done: int) -> None:
        self._strategy = strategy
        self._done = done
        self.trained: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `Strategy.configure_train`."""
        return self._strategy.configure_train(self._done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See `Strategy.aggregate_train`."""
        arrays, metrics = self._strategy.aggregate_train(self._done + server_round, replies)
        self.trained = _values(metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `Strategy.configure_evaluate`."""
        return self._strategy.configure_evaluate(self._done + server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """See `Strategy.aggregate_evaluate`."""
        metrics = self._strategy.aggregate_evaluate(self._done + server_round, replies)
        self.evaluated = _values(metrics)
        return metrics

    def summary(self) -> None:
        """See `Strategy.summary`."""
        self._strategy.summary()


def _values(metrics: object) -> dict[str, Any]:
    return dict(metrics) if isinstance(metrics, MetricRecord) else {}


def has_own_start(strategy: Strategy) -> bool:
    """Whether a strategy goes through its rounds in a way of its own: nobody can step in."""
    return type(strategy).start is not Strategy.start


def state_of(strategy: Strategy) -> Any:
    """Return what a strategy has to remember from round to round, as plain data and tensors.

    Its `state_dict()` if it has one. Otherwise its attributes, as Flower's own strategies keep
    their state in these; a strategy that wraps another is saved with it. Functions, classes and
    layouts are left out: they are made anew as they were.

    Raises:
        UnsavableError: it has a `start` of its own, whose place in mid-run nobody knows.
    """
    if has_own_start(strategy):
        raise UnsavableError(f"{type(strategy).__name__} has a `start` of its own")
    if hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict"):
        return strategy.state_dict()
    return {
        name: state_of(value) if isinstance(value, Strategy) else value
        for name, value in vars(strategy).items()
        if not isinstance(value, _MADE_ANEW)
    }


def restore(strategy: Strategy, state: Any) -> None:
    """Set back what `state_of` returned of a strategy that was built with the same arguments."""
    if hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(state)
        return
    for name, value in state.items():
        inner = getattr(strategy, name, None)
        if isinstance(inner, Strategy):
            restore(inner, value)
        else:
            setattr(strategy, name, value)
