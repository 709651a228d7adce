"""Running sums over a cohort's updates: the weighted mean, and how the updates align.

The sums are associative, so a cohort may be reduced in one worker, in several, or client by client.
Memory is a few parameter vectors, whatever the cohort's size.
"""

import math
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedinit.parameters import Array, Layout, tensor

ARRAYS, METRICS, NUM_EXAMPLES = "arrays", "metrics", "num-examples"
LOCAL_NORM = "local-norm"  # metric of a client whose update counts as D_i / a_i (FedNova)


class CohortSums:
    """Sums over updates D_i = x - y_i of clients with n_i examples, in float64.

    Args:
        layout: the model's layout; updates are over its trainable arrays.
        alignment: whether to sum what gradient diversity and the cosines need.
    """

    def __init__(self, layout: Layout, alignment: bool = True) -> None:
        self.layout = layout
        self.alignment = alignment
        self.clients = 0
        self.examples = 0.0
        self.moved = 0  # clients whose update is not zero
        self.squared_norms = 0.0  # Q = sum ||D_i||^2
        size = sum(layout.sizes)
        self.total = torch.zeros(size, dtype=torch.float64)  # S = sum D_i
        # With w_i = n_i / a_i, sum w_i D_i = w_1 S + sum (w_i - w_1) D_i: the last sum costs
        # nothing while clients are alike, and a vector's pass through memory is what a small
        # client's update waits for.
        self.first_weight = 0.0
        self.unequal: Tensor | None = None
        self.directions = torch.zeros(size if alignment else 0, dtype=torch.float64)  # U
        self.rest: dict[str, Tensor] = {}  # sum n_i b_i; integer buffers: the first client's
        self.extra: dict[str, dict[str, Tensor]] = {}  # sum n_i e_i of further ArrayRecords
        self.metrics: dict[str, float] = {}  # sum n_i m_i

    def add(self, start: Tensor, reply: RecordDict) -> None:
        """Add one reply to a message that carried the vector `start`.

        The reply follows Flower's convention: `arrays`, and `metrics` with `num-examples`; scalar
        metrics and further ArrayRecords are averaged with the same weights.
        """
        metrics: dict[str, Any] = dict(reply[METRICS])
        examples = float(metrics.pop(NUM_EXAMPLES))
        arrays: ArrayRecord = reply[ARRAYS]  # type: ignore[assignment]
        update = start - self.layout.flatten(arrays)
        weight = examples / metrics.get(LOCAL_NORM, 1.0)
        if not self.clients:
            self.first_weight = weight
        self.clients += 1
        self.examples += examples
        self.total.add_(update)
        if weight != self.first_weight:
            self._add_unequal(update, weight - self.first_weight)
        if self.alignment:
            norm = torch.linalg.vector_norm(update, dtype=torch.float64).item()
            self.squared_norms += norm**2
            if norm > 0:
                self.moved += 1
                self.directions.add_(update, alpha=1 / norm)
        self._accumulate(self.rest, self.layout.rest(arrays), examples)
        for name, record in reply.array_records.items():
            if name != ARRAYS:
                further = {key: tensor(value) for key, value in record.items()}
                self._accumulate(self.extra.setdefault(name, {}), further, examples)
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.metrics[name] = self.metrics.get(name, 0.0) + examples * value

    def merge(self, other: "CohortSums") -> None:
        """Add another share of the cohort."""
        self.first_weight = self.first_weight or other.first_weight
        self._add_unequal(other.total, other.first_weight - self.first_weight)
        if other.unequal is not None:
            self._add_unequal(other.unequal, 1.0)
        self.clients += other.clients
        self.examples += other.examples
        self.moved += other.moved
        self.squared_norms += other.squared_norms
        self.total += other.total
        self.directions += other.directions
        self._accumulate(self.rest, other.rest, 1.0)
        for name, sums in other.extra.items():
            self._accumulate(self.extra.setdefault(name, {}), sums, 1.0)
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def _add_unequal(self, vector: Tensor, factor: float) -> None:
        if factor:
            if self.unequal is None:
                self.unequal = torch.zeros_like(self.total)
            self.unequal.add_(vector, alpha=factor)

    @staticmethod
    def _accumulate(sums: dict[str, Tensor], values: dict[str, Tensor], weight: float) -> None:
        for name, value in values.items():
            if not value.is_floating_point():
                sums.setdefault(name, value.clone())
            elif name in sums:
                sums[name].add_(value, alpha=weight)
            else:
                sums[name] = value.double() * weight

    def __getstate__(self) -> dict[str, Any]:
        # As ndarrays the vectors travel through shared memory; as tensors they would be copied.
        return {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            self.__dict__[name] = torch.tensor(value) if isinstance(value, np.ndarray) else value

    def mean_update(self) -> Tensor:
        """D = sum p_i D_i in float64, p_i = n_i / sum n_i.

        Of clients that tell their local norm a_i, as nova's do, tau_eff sum p_i D_i / a_i with
        tau_eff = sum p_i a_i (Wang et al. 2020, eq. 6).
        """
        scale = self.mean_metrics().get(LOCAL_NORM, 1.0) / self.examples
        mean = self.total * (self.first_weight * scale)
        return mean if self.unequal is None else mean.add_(self.unequal, alpha=scale)

    def mean_rest(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain weighted mean of what is not trained, typed as `start`; integers are copied."""
        return {
            name: (self.rest[name] / self.examples).to(value.dtype)
            if value.is_floating_point()
            else self.rest[name]
            for name, value in start.items()
        }

    def mean_extra(self, name: str) -> dict[str, Tensor]:
        """The weighted mean of a further ArrayRecord's arrays, in float64."""
        return {key: value / self.examples for key, value in self.extra[name].items()}

    def mean_metrics(self) -> dict[str, float]:
        """The weighted mean of every scalar metric."""
        return {name: value / self.examples for name, value in self.metrics.items()}

    def reply(self, start: ArrayRecord, dtype: torch.dtype) -> RecordDict:
        """One reply that stands for all those added to `start`: their mean, the examples summed.

        Args:
            start: the weights that the clients started from.
            dtype: of the mean. In float64 the cohort's mean does not depend on who reduced what.
        """
        rest = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.layout.rest(start).items()
        }
        mean = (self.layout.flatten(start) - self.mean_update()).to(dtype)
        arrays = self.layout.record(mean, self.mean_rest(rest))
        metrics = MetricRecord({NUM_EXAMPLES: self.examples, **self.mean_metrics()})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        for name in self.extra:
            content[name] = ArrayRecord(
                {key: Array(value.numpy()) for key, value in self.mean_extra(name).items()}
            )
        return content

    def gradient_diversity(self) -> float:
        """Q / ||S||^2 (Yin et al. 2018, Definition 1): 1/n for equal updates, 1 for orthogonal.

        Infinite when the updates cancel; NaN when none moved.
        """
        total = torch.dot(self.total, self.total).item()
        if total > 0:
            return self.squared_norms / total
        return math.inf if self.moved else math.nan

    def mean_pairwise_cosine(self) -> float:
        """(||U||^2 - m) / (m (m - 1)) over the m updates that are not zero; NaN for m < 2."""
        kept = self.moved
        if kept < 2:
            return math.nan
        return (torch.dot(self.directions, self.directions).item() - kept) / (kept * (kept - 1))
