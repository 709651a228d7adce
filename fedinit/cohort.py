"""Running sums over a cohort's updates: the weighted mean, and how the updates align.

The sums are associative, so a cohort may be reduced in one worker, in several, or client by client.
Memory is some parameter vectors for each process that reduces, whatever the cohort's size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedinit.parameters import Array, Layout, tensor

ARRAYS, METRICS, NUM_EXAMPLES = "arrays", "metrics", "num-examples"
LOCAL_NORM = "local-norm"  # metric of a client whose update counts as D_i / a_i (FedNova)

_SHORT = 1 << 17  # elements of a vector that, in float64, is half of a core's cache
_TOGETHER = 8  # updates that go through the sums together: one pass through memory serves all
_ROOM_BYTES = 400 << 20  # that updates may wait in; long ones go through the sums in smaller groups
_BLOCK = 1 << 16  # elements of a block: what is made of it stays in a core's cache
_GPU_BLOCK = 1 << 22  # likewise on a GPU, where a block costs its launches

# Room where updates wait: the kernel's first touch of new memory costs more than the sums.
_spare: list[Tensor] = []


class Trained(NamedTuple):
    """What a client makes of x in a round, in whatever form it travels.

    Attributes:
        weights: the trained vector y; it may be the model's own, which the next client changes.
        metrics: `num-examples` and what is averaged with it.
        rest: the model's arrays outside the vector.
        extra: further arrays, by their record's name.
    """

    weights: Tensor
    metrics: Mapping[str, Any]
    rest: Mapping[str, Tensor]
    extra: Mapping[str, Mapping[str, Tensor]]

    def content(self, layout: Layout) -> RecordDict:
        """Return it as the content of a reply, in Flower's convention."""
        rest = {name: value.cpu() for name, value in self.rest.items()}
        content = RecordDict(
            {
                ARRAYS: layout.record(self.weights.to("cpu", copy=True), rest),
                METRICS: MetricRecord(dict(self.metrics)),
            }
        )
        for name, arrays in self.extra.items():
            content[name] = _record(arrays)
        return content


@dataclass(eq=False)
class _Share:
    """The sums over one process's part of a cohort.

    With w_i = n_i / a_i, sum w_i D_i = w_1 S + sum (w_i - w_1) D_i: the last sum is not there while
    clients are alike.
    """

    first_weight: float  # w_1
    # Rows, in float64 until they travel: S = sum D_i; U = sum D_i / ||D_i||; sum (w_i - w_1) D_i.
    sums: Tensor
    alignment: bool  # whether the second row is there
    uneven: bool = False  # whether the last row is
    empty: bool = True  # whether the rows still hold what was in their memory before
    travelled: bool = False  # whether another process made it: nothing is added any more
    found: "_Found | None" = None  # what it came to, last, with others

    @property
    def total(self) -> Tensor:
        return self.sums[0]

    @property
    def directions(self) -> Tensor:
        return self.sums[1]

    @property
    def unequal(self) -> Tensor | None:
        return self.sums[-1] if self.uneven else None

    def add_unequal(self) -> None:
        """Let the last row be there from now on."""
        if not self.uneven:
            self.sums = torch.cat([self.sums, torch.zeros_like(self.sums[:1])])
            self.uneven = True

    def packed(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Return what travels, the sums rounded to the updates' dtype: D is, too, and x far more.

        With w_1 = 0 the last row is sum w_i D_i: rounded apart, two large terms might cancel.
        """
        if self.uneven and self.first_weight:
            self.sums[-1].add_(self.total, alpha=self.first_weight)
            self.first_weight = 0.0
        sums = self.sums.to(_wider(dtype, torch.float32))
        return vars(self) | {"sums": sums.cpu().numpy(), "travelled": True, "found": None}


class _Found(NamedTuple):
    """What the sums of a cohort come to.

    Attributes:
        shares, number: whose sums.
        update: D, in the updates' dtype.
        norm: of D.
        total: ||S||^2.
        directions: ||U||^2; 0 if nobody formed U.
    """

    shares: WeakSet[_Share]
    number: int
    update: Tensor
    norm: float
    total: float
    directions: float


class CohortSums:
    """Sums over updates D_i = x - y_i of clients with n_i examples.

    They are formed in float64, and rounded to the updates' dtype when they travel.
    A pass through vectors that lie in memory is what takes time here: long updates go through the
    sums block by block and several at a time, and merging shares adds nothing up before a result is
    asked for.

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
        self._moved = 0  # clients whose update is not zero
        self._squared_norms = 0.0  # Q = sum ||D_i||^2
        self._shares: list[_Share] = []
        self._own: _Share | None = None  # the one that is added to
        self._dtype: torch.dtype | None = None  # of the updates
        self._known: _Found | None = None
        self._updates = self._squares = torch.empty(0)  # D_i and ||D_i||^2, not yet in the sums
        self._waiting: list[float] = []  # their w_i - w_1
        self._sent = self._start = torch.empty(0)  # x as it was sent, and where the updates lie

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
            for name, record in reply.array_records.items()
            if name != ARRAYS
        }
        weights, rest = self.layout.flatten(arrays), self.layout.rest(arrays)
        self.add_trained(start, Trained(weights, metrics, rest, extra))

    def add_trained(self, start: Tensor, trained: Trained) -> None:
        """Add what a client made of the vector `start`; its weights may change afterwards."""
        metrics = trained.metrics
        examples = float(metrics[NUM_EXAMPLES])
        self._known = None
        weight = examples / metrics.get(LOCAL_NORM, 1.0)
        if self._own is None:
            self._own = self._begin(start, trained.weights, weight)
        if self._sent is not start:
            self._sent, self._start = start, start.to(trained.weights.device)
        unequal = weight - self._own.first_weight
        if len(start) <= _SHORT and not trained.weights.is_cuda:
            self._sum_short(self._own, trained.weights, unequal)
        else:
            self._wait(trained.weights, unequal)
        self._accumulate(self.rest, trained.rest, examples)
        for name, arrays in trained.extra.items():
            self._accumulate(self.extra.setdefault(name, {}), arrays, examples)
        for name, value in metrics.items():
            if name != NUM_EXAMPLES and isinstance(value, int | float):
                self.metrics[name] = self.metrics.get(name, 0.0) + examples * value
        self.clients += 1
        self.examples += examples

    def _begin(self, start: Tensor, weights: Tensor, first_weight: float) -> _Share:
        self._dtype = _wider(_wider(self._dtype, start.dtype), weights.dtype)
        sums = weights.new_empty(1 + self.alignment, len(weights), dtype=torch.float64)
        share = _Share(first_weight, sums, self.alignment)
        self._shares.append(share)
        return share

    def _sum_short(self, share: _Share, weights: Tensor, unequal: float) -> None:
        """Let a short vector into the sums at once, while it is in the cache."""
        update = torch.sub(self._start, weights).double()
        if share.empty:
            share.sums.zero_()
            share.empty = False
        share.total.add_(update)
        if self.alignment:
            square = torch.dot(update, update).item()
            self._squared_norms += square
            if square > 0:
                self._moved += 1
                share.directions.add_(update, alpha=square**-0.5)
        if unequal:
            share.add_unequal()
            share.sums[-1].add_(update, alpha=unequal)

    def _wait(self, weights: Tensor, unequal: float) -> None:
        """Put x - y and its squared norm where they wait."""
        place, width = len(self._waiting), _width(weights)
        if not place:
            self._updates = _room(weights.to(self._dtype))
            self._squares = weights.new_zeros(len(self._updates), dtype=torch.float64)
        squares = []
        for start, end, update in zip(
            *(each.split(width) for each in (self._start, weights, self._updates[place])),
            strict=True,
        ):
            torch.sub(start, end, out=update)
            if self.alignment:
                block = update.double()
                squares.append(torch.dot(block, block))
        if squares:
            self._squares[place] = torch.stack(squares).sum()
        self._waiting.append(unequal)
        if len(self._waiting) == len(self._updates):
            self._sum_waiting()

    def _sum_waiting(self) -> None:
        """Let the updates that wait into S, Q, U and the sum of unequal weights."""
        share, unequal = self._own, self._waiting
        if share is None or not unequal:
            return
        self._waiting = []
        if any(unequal):
            share.add_unequal()
        squares = self._squares[: len(unequal)]
        factors = [torch.ones_like(squares)]
        if self.alignment:
            moved = squares > 0
            self._moved += int(moved.sum())
            self._squared_norms += squares.sum().item()
            factors.append(torch.where(moved, squares.rsqrt(), 0.0))
        if share.uneven:
            factors.append(squares.new_tensor(unequal))
        weights, width = torch.stack(factors), 2 * _width(squares) // len(unequal)
        buffer = squares.new_empty(len(unequal), min(width, share.sums.shape[1]))
        updates = self._updates[: len(unequal)].split(width, dim=1)
        kept = 0 if share.empty else 1
        for block, sums in zip(updates, share.sums.split(width, dim=1), strict=True):
            sums.addmm_(weights, buffer[:, : block.shape[1]].copy_(block), beta=kept)
        share.empty = False
        _spare[:] = [self._updates]
        self._updates = torch.empty(0)

    def merge(self, other: "CohortSums") -> None:
        """Add another share of the cohort; its vectors are shared with it."""
        other._sum_waiting()
        self._shares += other._shares
        self._known = None
        self._dtype = _wider(self._dtype, other._dtype)
        self.clients += other.clients
        self.examples += other.examples
        self._moved += other._moved
        self._squared_norms += other._squared_norms
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
        self._sum_waiting()
        return self.__dict__ | {
            "_shares": [share.packed(self._dtype) for share in self._shares],
            "_own": None,
            "_known": None,
            **dict.fromkeys(("_updates", "_squares", "_sent", "_start")),
            "rest": {name: value.cpu() for name, value in self.rest.items()},
            "extra": {
                name: {key: value.cpu() for key, value in arrays.items()}
                for name, arrays in self.extra.items()
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._updates = self._squares = self._sent = self._start = torch.empty(0)
        # As ndarrays they travelled through shared memory; as tensors they would have been copied.
        self._shares = [
            _Share(**share | {"sums": torch.from_numpy(share["sums"])})
            for share in state["_shares"]
        ]

    def mean_update(self) -> Tensor:
        """D = sum p_i D_i in float64, p_i = n_i / sum n_i.

        Of clients that tell their local norm a_i, as nova's do, tau_eff sum p_i D_i / a_i with
        tau_eff = sum p_i a_i (Wang et al. 2020, eq. 6).
        """
        self._sum_waiting()
        return torch.cat(list(_added(self._mean_terms())))

    def pseudo_gradient(self) -> Tensor:
        """D as a server optimizer steps on it, in the updates' dtype; to read, not to write to."""
        return self._found().update

    def update_norm(self) -> float:
        """||D||."""
        return self._found().norm

    def _mean_terms(self) -> list[tuple[Tensor, float]]:
        scale = self._scale()
        terms = [(each.total, each.first_weight * scale) for each in self._shares]
        return terms + [(each.unequal, scale) for each in self._shares if each.unequal is not None]

    def _scale(self) -> float:
        return self.mean_metrics().get(LOCAL_NORM, 1.0) / self.examples

    def _found(self) -> _Found:
        """Read all sums, once.

        What shares that travelled come to is kept with them: a strategy and whoever records the
        round both ask, and each merges them for itself.
        """
        self._sum_waiting()
        first, shares = self._shares[0], set(self._shares)
        known = self._known or first.found
        if known and known.number == len(shares) and set(known.shares) == shares:
            return known
        weights = {each.first_weight for each in shares}
        alike = len(weights) == 1 and not any(each.uneven for each in shares)
        factor = first.first_weight * self._scale()
        sums = [[(each.total, 1.0) for each in self._shares]]
        if first.alignment:
            sums.append([(each.directions, 1.0) for each in self._shares])
        if not alike:
            sums.append(self._mean_terms())
        update = torch.empty_like(first.total, dtype=self._dtype)
        squares = [0.0, 0.0, 0.0]
        for place, total, *others in zip(update.split(_BLOCK), *map(_added, sums), strict=True):
            mean = total * factor if alike else others.pop()
            place.copy_(mean)
            for index, block in enumerate((mean, total, *others)):
                squares[index] += torch.dot(block, block).item()
        found = _Found(WeakSet(shares), len(shares), update, squares[0] ** 0.5, *squares[1:])
        if all(each.travelled for each in shares):
            for each in shares:
                each.found = found
        self._known = found
        return found

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
        total = self._found().total
        if total > 0:
            return self._squared_norms / total
        return math.inf if self._moved else math.nan

    def mean_pairwise_cosine(self) -> float:
        """(||U||^2 - m) / (m (m - 1)) over the m updates that are not zero; NaN for m < 2."""
        directions, kept = self._found().directions, self._moved
        return (directions - kept) / (kept * (kept - 1)) if kept > 1 else math.nan


def _record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(value.cpu().numpy()) for key, value in arrays.items()})


def _room(weights: Tensor) -> Tensor:
    """Return room for updates that wait, a row for each.

    How many that is depends on the model alone: so, then, do the sums' last digits.
    """
    most = _ROOM_BYTES // (weights.element_size() * len(weights))
    shape = max(1, min(_TOGETHER, most)), len(weights)
    fitting = [
        each
        for each in _spare
        if each.shape == shape and each.dtype == weights.dtype and each.device == weights.device
    ]
    _spare.clear()
    return fitting[0] if fitting else weights.new_empty(shape)


def _wider(one: torch.dtype | None, other: torch.dtype | None) -> torch.dtype | None:
    return torch.promote_types(one, other) if one and other else one or other


def _width(vectors: Tensor) -> int:
    return _GPU_BLOCK if vectors.is_cuda else _BLOCK


def _added(terms: Sequence[tuple[Tensor, float]]) -> Iterator[Tensor]:
    """Yield the blocks of a sum of vectors times factors."""
    (_, first), *_ = terms
    for block, *others in zip(*(vector.split(_BLOCK) for vector, _ in terms), strict=True):
        total = block.double() if first == 1.0 else block.double() * first
        for other, (_, factor) in zip(others, terms[1:], strict=True):
            total = torch.add(total, other.double(), alpha=factor)
        yield total


def inner_product(first: Tensor, second: Tensor) -> float:
    """The inner product of two vectors, formed in float64."""
    blocks = zip(first.split(_BLOCK), second.split(_BLOCK), strict=True)
    return sum(torch.dot(one.double(), other.double()).item() for one, other in blocks)
