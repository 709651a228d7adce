"""A cohort reduced: the weighted mean of what its clients made, and how their updates align.

The sums are associative, so a cohort may be reduced in one worker, in several, or client by client.
Memory is some tens of parameter vectors (on a GPU a hundred; a few where they are long) for each
process that reduces, whatever the cohort's size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedinit.parameters import Array, Layout, tensor
from fedinit.partial_sums import Found, PartialSums, find, mean

ARRAYS, METRICS, NUM_EXAMPLES = "arrays", "metrics", "num-examples"
LOCAL_NORM = "local-norm"  # metric of a client whose update counts as D_i / a_i (FedNova)


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return a content's ArrayRecords by name.

    Flower's properties, this one's namesake and the others, return a dict that refers to itself
    and to the content: that stays in memory, with its arrays, until Python next looks for cycles.
    """
    return {name: each for name, each in content.items() if isinstance(each, ArrayRecord)}


class Trained(NamedTuple):
    """What a client makes of x in a round, in whatever form it travels.

    Attributes:
        weights: the trained vector y; it may be the model's own, which the next client changes.
        metrics: `num-examples` and what is averaged with it.
        rest: the model's arrays outside the vector, but for those that are as they were sent.
        extra: further arrays, by their record's name.
    """

    weights: Tensor
    metrics: Mapping[str, Any]
    rest: Mapping[str, Tensor]
    extra: Mapping[str, Mapping[str, Tensor]]

    def content(self, layout: Layout, start: ArrayRecord) -> RecordDict:
        """Return it as the content of a reply, in Flower's convention.

        Args:
            layout: the model's.
            start: the weights that the client got.
        """
        rest = layout.rest(start) | {name: value.cpu() for name, value in self.rest.items()}
        content = RecordDict(
            {
                ARRAYS: layout.record(self.weights.to("cpu", copy=True), rest),
                METRICS: MetricRecord(dict(self.metrics)),
            }
        )
        for name, arrays in self.extra.items():
            content[name] = _record(arrays)
        return content


# Trains clients as one, and returns what each makes of x.
TrainGroup = Callable[[Sequence[int]], Sequence[Trained]]


class CohortSums:
    """Sums over updates D_i = x - y_i of clients with n_i examples.

    Merging adds no updates up: the processes' partial sums of them are read together when a result
    is asked for.

    Args:
        layout: the model's layout; updates are over its trainable arrays.
        alignment: whether to sum what gradient diversity and the cosines need.
    """

    def __init__(self, layout: Layout, alignment: bool = True) -> None:
        self.layout = layout
        self.alignment = alignment
        self.clients = 0
        self.examples = 0.0
        self.rest: dict[str, Tensor] = {}  # sum n_i b_i; integer buffers: the first client's
        self.extra: dict[str, dict[str, Tensor]] = {}  # sum n_i e_i of further ArrayRecords
        self.metrics: dict[str, float] = {}  # sum n_i m_i
        self._parts: list[PartialSums] = []
        self._own: PartialSums | None = None  # the one that is added to

    def add(self, start: Tensor, reply: RecordDict) -> None:
        """Add one reply to a message that carried the vector `start`.

        The reply follows Flower's convention: `arrays`, and `metrics` with `num-examples`; scalar
        metrics and further ArrayRecords are averaged with the same weights.
        """
        arrays: ArrayRecord = reply[ARRAYS]  # type: ignore[assignment]
        sums = getattr(arrays, "sums", None)
        if sums is not None:  # nobody has touched the mean: what it was formed from says more
            self.merge(sums)
            return
        metrics: dict[str, Any] = dict(reply[METRICS])
        extra = {
            name: {key: tensor(value) for key, value in record.items()}
            for name, record in array_records(reply).items()
            if name != ARRAYS
        }
        weights, rest = self.layout.flatten(arrays), self.layout.rest(arrays)
        self.add_trained(start, Trained(weights, metrics, rest, extra))

    def add_trained(self, start: Tensor, *group: Trained) -> None:
        """Add what clients made of the vector `start`; their weights may change afterwards."""
        examples = [float(each.metrics[NUM_EXAMPLES]) for each in group]
        factors = [
            count / each.metrics.get(LOCAL_NORM, 1.0)
            for count, each in zip(examples, group, strict=True)
        ]
        if self._own is None:
            self._own = PartialSums(start, group[0].weights, factors[0], self.alignment)
            self._parts.append(self._own)
        self._own.add(start, [each.weights for each in group], factors)
        for count, trained in zip(examples, group, strict=True):
            self._accumulate(self.rest, trained.rest, count)
            for name, arrays in trained.extra.items():
                self._accumulate(self.extra.setdefault(name, {}), arrays, count)
            for name, value in trained.metrics.items():
                if name != NUM_EXAMPLES and isinstance(value, int | float):
                    self.metrics[name] = self.metrics.get(name, 0.0) + count * value
            self.clients += 1
            self.examples += count

    def merge(self, other: "CohortSums") -> None:
        """Add another share of the cohort; its vectors are shared with it."""
        for each in other._parts:
            each.finish()
        self._parts += other._parts
        self.clients += other.clients
        self.examples += other.examples
        self._accumulate(self.rest, other.rest, 1.0)
        for name, sums in other.extra.items():
            self._accumulate(self.extra.setdefault(name, {}), sums, 1.0)
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    @staticmethod
    def _accumulate(sums: dict[str, Tensor], values: Mapping[str, Tensor], weight: float) -> None:
        for name, value in values.items():
            if not value.is_floating_point():
                sums.setdefault(name, value.clone())
            elif name in sums:
                sums[name].add_(value, alpha=weight)
            else:
                sums[name] = value.double() * weight

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_own": None,
            "rest": {name: value.cpu() for name, value in self.rest.items()},
            "extra": {
                name: {key: value.cpu() for key, value in arrays.items()}
                for name, arrays in self.extra.items()
            },
        }

    def mean_update(self) -> Tensor:
        """D = sum p_i D_i in float64, p_i = n_i / sum n_i.

        Of clients that tell their local norm a_i, as nova's do, tau_eff sum p_i D_i / a_i with
        tau_eff = sum p_i a_i (Wang et al. 2020, eq. 6).
        """
        return mean(self._parts, self._scale())

    def pseudo_gradient(self) -> Tensor:
        """D as a server optimizer steps on it, in the updates' dtype; to read, not to write to."""
        return self._found().update

    def update_norm(self) -> float:
        """||D||."""
        return self._found().norm

    def _scale(self) -> float:
        return self.mean_metrics().get(LOCAL_NORM, 1.0) / self.examples

    def _found(self) -> Found:
        return find(self._parts, self._scale())

    def mean_rest(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain weighted mean of what is not trained, typed as `start`; integers are copied.

        What nobody sent back is as it was.
        """
        means = {
            name: value / self.examples if value.is_floating_point() else value
            for name, value in self.rest.items()
        }
        return {name: means.get(name, value).to(value.dtype) for name, value in start.items()}

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
            dtype: of the mean. In float64 the cohort's hardly depends on who reduced what.
        """
        x = self.layout.flatten(start)
        rest = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.layout.rest(start).items()
        }
        arrays = self.layout.later(
            lambda: (x - self.mean_update()).to(dtype), dtype, self.mean_rest(rest)
        )
        arrays.sums = self
        metrics = MetricRecord({NUM_EXAMPLES: self.examples, **self.mean_metrics()})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        for name in self.extra:
            content[name] = _record(self.mean_extra(name))
        return content

    def gradient_diversity(self) -> float:
        """Q / ||S||^2 (Yin et al. 2018, Definition 1): 1/n for equal updates, 1 for orthogonal.

        Infinite when the updates cancel to the last digit; NaN when none moved.
        """
        update, squares = self._found().update, sum(each.squared_norms for each in self._parts)
        total, digits = self._found().total, torch.finfo(update.dtype).eps
        if total > squares * digits**2:
            return squares / total
        return math.inf if self._moved() and not math.isnan(total) else math.nan

    def mean_pairwise_cosine(self) -> float:
        """(||U||^2 - m) / (m (m - 1)) over the m updates that are not zero; NaN for m < 2."""
        directions, kept = self._found().directions, self._moved()
        if kept < 2:
            return math.nan
        return float(np.clip((directions - kept) / (kept * (kept - 1)), -1, 1))

    def _moved(self) -> int:
        return sum(each.moved for each in self._parts)


def _record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(value.cpu().numpy()) for key, value in arrays.items()})
