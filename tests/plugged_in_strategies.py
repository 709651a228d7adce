"""Strategies as a user would plug them in, each a FedAvg with an idea of its own."""

import random

from flwr.app import Array, MetricRecord
from flwr.serverapp.strategy import FedAvg


class HalfStep(FedAvg):
    """A user's own strategy: Flower's FedAvg that goes only half of the way."""

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays.to_numpy_ndarrays()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        means = arrays.to_numpy_ndarrays()
        half = [(old + new) / 2 for old, new in zip(self.before, means, strict=True)]
        return type(arrays)(dict(zip(arrays, map(_array, half), strict=True))), metrics


class Handing(FedAvg):
    """Takes an argument of its own, and hands on whatever else it is given."""

    def __init__(self, extra=1.0, **arguments):
        super().__init__(**arguments)
        self.extra = extra


class Remembering(FedAvg):
    """A user's strategy whose step depends on all rounds before, kept where it says itself."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self._moments = [0.0]

    def state_dict(self):
        return {"moments": list(self._moments)}

    def load_state_dict(self, state):
        self._moments = state["moments"]

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._moments.append(0.5 * self._moments[-1] + server_round)
        moved = [each + 1e-3 * self._moments[-1] for each in arrays.to_numpy_ndarrays()]
        return type(arrays)(dict(zip(arrays, map(_array, moved), strict=True))), metrics


class Decaying(FedAvg):
    """Keeps its rate in the config that Flower hands it from round to round, as tutorials do."""

    def configure_train(self, server_round, arrays, config, grid):
        config["rate"] = float(config.get("rate", 1.0)) / 2
        self.rate = random.random() * config["rate"]  # and draws from Python's generator
        self.before = arrays.to_numpy_ndarrays()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        moved = [
            old + self.rate * (new - old)
            for old, new in zip(self.before, arrays.to_numpy_ndarrays(), strict=True)
        ]
        return type(arrays)(dict(zip(arrays, map(_array, moved), strict=True))), metrics


class Raising(FedAvg):
    """A strategy with a mistake in it."""

    def aggregate_train(self, server_round, replies):
        if server_round == 2:
            raise KeyError("no second round")
        return super().aggregate_train(server_round, replies)


class Silent(FedAvg):
    """Forgets to return what it made."""

    def aggregate_train(self, server_round, replies):
        super().aggregate_train(server_round, replies)
        return None, None


class OwnStart(FedAvg):
    """Has a `start` of its own, whose place in mid-run nobody else knows."""

    def start(self, *arguments, **named):
        return super().start(*arguments, **named)


class Telling(FedAvg):
    """Says something of each round, beside its clients' means."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        own = {"square": server_round**2, "sides": [1.0, float("nan")], "train-loss": 9.0}
        return arrays, MetricRecord({**metrics, **own})


def _array(values):
    return Array(values)
