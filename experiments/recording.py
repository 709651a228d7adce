"""What a round leaves: its line, with x tested where that is due."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from experiments.wiring import Simulation
from fedinit.cohort import ARRAYS, METRICS, CohortSums
from fedinit.device import device, threads_for
from fedinit.measurements.hessian import top_hessian_eigenvalues
from fedinit.partial_sums import inner_product
from fedinit.randomness import Draw, keyed
from fedinit.simulation import ClientError, RayGrid
from fedinit.simulation.observed_grid import ObservedGrid
from strategies.continuing import Continued

MeasuringGrid = RayGrid | ObservedGrid  # a Flower grid that sums over the updates it carries
_TEST_PARTS = 8  # that the test set is evaluated in: enough to keep the workers busy
_HESSIAN_BATCH = 128  # rows of one Hessian-vector product at a time
_HESSIAN_TOLERANCE = 1e-3  # of the eigenvalues, relative


class DivergedError(RuntimeError):
    """A loss or a weight is no finite number: there is nothing left to learn from this run."""

    def __init__(self, what: str, server_round: int) -> None:
        super().__init__(f"{what} not finite in round {server_round}")
        self.server_round = server_round


class Recorder:
    """Strategy.start's `evaluate_fn`: makes a round's line, testing x every `evaluate_every`.

    Args:
        prepared: the run.
        grid: the grid that it runs on.
        strategy: tells what its strategy makes of the replies.
        record: called with each round's line and x.
        previous: the aggregate of the round before the first one here.

    Attributes:
        previous: the last round's aggregate D.
    """

    def __init__(
        self,
        prepared: Simulation,
        grid: MeasuringGrid,
        strategy: Continued,
        record: Callable[[dict[str, Any], ArrayRecord], None],
        previous: torch.Tensor | None = None,
    ) -> None:
        self._prepared = prepared
        self._grid = grid
        self._strategy = strategy
        self._record = record
        self._parts = min(_TEST_PARTS, prepared.problem.dataset.test_size)
        self._sequences = prepared.problem.dataset.has_sequences
        self.previous = previous
        self._since = time.perf_counter()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Record the round that just ended; return the test metrics if x was tested.

        Raises:
            DivergedError: a loss or a weight is not finite; the round is recorded.
            ClientError: every client of the round failed.
        """
        run = self._prepared.run
        sums, failures = self._grid.take_sums(), self._grid.failures.take()
        if failures and sums is None:
            raise ClientError(f"round {server_round}: no client survived; {failures[0]}")
        due = server_round % run.evaluate_every == 0 or server_round == run.rounds
        tested = evaluate_test(self._grid, arrays, self._parts) if due else {}
        now = time.perf_counter()
        with threads_for(sum(self._prepared.problem.layout.sizes)):
            line = {
                "round": server_round,
                **(self._training(sums) if sums is not None else {}),
                **(_failed(failures) if sums is not None and run.on_client_error == "skip" else {}),
                **self._strategys_own(sums),
                "test_loss": tested.get("loss"),
                "test_accuracy": tested.get("accuracy"),
                **({"test_perplexity": _perplexity(tested)} if self._sequences else {}),
                "wall_seconds": round(now - self._since, 4),
            }
            not_finite = self._not_finite(line, arrays)
        if not_finite:
            line["diverged"] = not_finite
        elif server_round == 0:
            line |= initial_curvature(self._prepared)
        self._since = time.perf_counter()
        self._record(line, arrays)
        if not_finite:
            raise DivergedError(not_finite, server_round)
        return MetricRecord(dict(tested)) if due else None

    def _not_finite(self, line: dict[str, Any], arrays: ArrayRecord) -> str | None:
        """Say what is not finite; the norm of D is, unless an entry is not."""
        for name in ("train_loss", "test_loss", "update_norm"):
            if not math.isfinite(line.get(name) or 0.0):
                return f"{name} is"
        return None if self._prepared.problem.layout.is_finite(arrays) else "weights are"

    def _training(self, sums: CohortSums) -> dict[str, Any]:
        metrics = sums.mean_metrics()
        previous, self.previous = self.previous, sums.pseudo_gradient()
        return {
            "train_loss": metrics.get("train-loss"),
            "train_accuracy": metrics.get("train-accuracy"),
            "cohort_size": sums.clients,
            "examples": int(sums.examples),
            "update_norm": sums.update_norm(),
            "gradient_diversity": sums.gradient_diversity(),
            "mean_pairwise_cosine": sums.mean_pairwise_cosine(),
            "cosine_with_previous": _cosine(previous, self.previous, sums.update_norm()),
        }

    def _strategys_own(self, sums: CohortSums | None) -> dict[str, Any]:
        """What the strategy made of the replies, but for the clients' means, which the line has."""
        known = {} if sums is None else sums.mean_metrics()
        own = {
            name: value
            for name, value in self._strategy.trained.items()
            if name not in known
            or not np.allclose(value, known[name], rtol=1e-6, atol=0, equal_nan=True)
        }
        evaluated = self._strategy.evaluated
        return {
            **({"strategy": own} if own else {}),
            **({"client_evaluation": evaluated} if evaluated else {}),
        }


def _failed(failures: list[str]) -> dict[str, Any]:
    """How many clients were skipped, and why the first was."""
    return {"failed_clients": len(failures), **({"client_error": failures[0]} if failures else {})}


def initial_curvature(prepared: Simulation) -> dict[str, float | int]:
    """Return the top Hessian eigenvalues at the initialization, where the run asks for them.

    The sample is of training rows, the same for every run with the same data and seed.
    """
    run, problem = prepared.run, prepared.problem
    if not run.measure.hessian:
        return {}

    owned = problem.dataset.owned
    rows = keyed(Draw.SAMPLE, run.seed).permutation(owned)[: run.measure.hessian]
    batches = []
    for at in range(0, len(rows), _HESSIAN_BATCH):
        inputs, targets = problem.dataset.batch(rows[at : at + _HESSIAN_BATCH])
        batches.append((inputs.to(device()), targets.to(device())))
    top = top_hessian_eigenvalues(
        problem.model.to(device()), problem.loss, batches, run.seed, _HESSIAN_TOLERANCE
    )
    return {f"hessian_{name}": value for name, value in asdict(top).items()}


def evaluate_test(grid: Grid, arrays: ArrayRecord, parts: int) -> dict[str, float]:
    """Evaluate x on the test set, in `parts` by as many nodes, or by all if there are fewer.

    Returns:
        `loss` and, where targets are labels, `accuracy`.
    """
    nodes = sorted(grid.get_node_ids())[:parts]
    replies = grid.send_and_receive(
        [
            Message(
                RecordDict(
                    {ARRAYS: arrays, "config": ConfigRecord({"part": part, "parts": len(nodes)})}
                ),
                dst_node_id=node,
                message_type="evaluate.test",
            )
            for part, node in enumerate(nodes)
        ]
    )
    parts_scored = []
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"evaluation failed: {reply.error.reason}")
        parts_scored.append(dict(reply.content.metric_records[METRICS]))
    return _weighted(parts_scored)


def _weighted(parts: Iterable[dict[str, Any]]) -> dict[str, float]:
    parts = list(parts)
    total = sum(part["num-examples"] for part in parts)
    return {
        name: sum(part[name] * part["num-examples"] for part in parts) / total
        for name in parts[0]
        if name != "num-examples"
    }


def _perplexity(tested: dict[str, float]) -> float | None:
    return float(np.exp(tested["loss"])) if tested else None


def _cosine(first: torch.Tensor | None, second: torch.Tensor, norm: float) -> float:
    """The cosine of two vectors, of which the second has this norm; NaN without a first."""
    if first is None:
        return math.nan
    norms = inner_product(first, first) ** 0.5 * norm
    return float(np.clip(inner_product(first, second) / norms, -1, 1)) if norms > 0 else math.nan
