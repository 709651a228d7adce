"""Running sums over one process's part of a cohort's updates, and what all parts come to.

A pass through vectors that lie in memory is what takes time here: long updates go through the sums
block by block and several at a time, and the sums of all parts are read once, together.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHORT = 1 << 17  # elements of a vector that, in float64, is half of a core's cache
_TOGETHER = 8  # updates that go through the sums together: one pass through memory serves all
_ROOM_BYTES = 400 << 20  # that updates may wait in; long ones go through the sums in smaller groups
_BLOCK = 1 << 16  # elements of a block: what is made of it stays in a core's cache
_GPU_BLOCK = 1 << 22  # likewise on a GPU, where a block costs its launches

# Room where updates wait: the kernel's first touch of new memory costs more than the sums.
_spare: list[Tensor] = []


class Found(NamedTuple):
    """What the sums of some parts come to.

    Attributes:
        parts: how many they were.
        scale: what the weighted sum of updates was multiplied with.
        update: D, in the updates' dtype.
        norm: of D.
        total: ||S||^2.
        directions: ||U||^2; 0 if nobody formed U.
    """

    parts: int
    scale: float
    update: Tensor
    norm: float
    total: float
    directions: float


class PartialSums:
    """The sums over one process's part of a cohort, of updates D_i = x - y_i with weights w_i.

    sum w_i D_i = w_1 S + sum (w_i - w_1) D_i: the last sum is not there while clients are alike.
    All are formed in float64, and rounded to the updates' dtype when they travel to another
    process, where they are read and nothing is added.

    Args:
        start: x, as the first client got it.
        weights: that client's y; where it lies, the sums lie.
        first_weight: w_1.
        alignment: whether to sum what gradient diversity and the cosines need.

    Attributes:
        dtype: of the updates.
        moved: clients whose update is not zero.
        squared_norms: Q = sum ||D_i||^2.
        found: what the sums came to, last, with those of other parts.
    """

    def __init__(
        self, start: Tensor, weights: Tensor, first_weight: float, alignment: bool
    ) -> None:
        self.dtype = torch.promote_types(start.dtype, weights.dtype)
        self.first_weight = first_weight
        self.alignment = alignment
        self.moved = 0
        self.squared_norms = 0.0
        self.found: Found | None = None
        # Rows: S = sum D_i; U = sum D_i / ||D_i||; sum (w_i - w_1) D_i.
        self._sums = weights.new_empty(1 + alignment, len(weights), dtype=torch.float64)
        self._uneven = False  # whether the last row is there
        self._empty = True  # whether the rows still hold what was in their memory before
        self._waiting: list[float] = []  # w_i - w_1 of updates that are not yet in the sums
        self._updates = self._squares = torch.empty(0)  # these, and their ||D_i||^2
        self._sent, self._start = start, start.to(weights.device)

    @property
    def total(self) -> Tensor:
        """S."""
        return self._sums[0]

    @property
    def directions(self) -> Tensor:
        """U, if it is formed."""
        return self._sums[1]

    @property
    def unequal(self) -> Tensor | None:
        """sum (w_i - w_1) D_i; None while all weights are alike."""
        return self._sums[-1] if self._uneven else None

    def add(self, start: Tensor, weights: Tensor, weight: float) -> None:
        """Add the update of a client that made y of x, with its weight; y may change afterwards."""
        self.found = None
        if self._sent is not start:
            self._sent, self._start = start, start.to(weights.device)
        unequal = weight - self.first_weight
        if len(start) <= _SHORT and not weights.is_cuda:
            self._sum_short(weights, unequal)
        else:
            self._wait(weights, unequal)

    def finish(self) -> None:
        """Let the updates that wait into S, Q, U and the sum of unequal weights."""
        if self._waiting:
            self._sum_waiting(self._sums.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels; no more digits than that are kept here.

        D is in the updates' dtype, too, and x far larger. With w_1 = 0 the last row is sum w_i D_i:
        rounded apart, two large terms might cancel.
        """
        if self.first_weight and (self._uneven or any(self._waiting)):
            self._add_unequal()
            if not self._empty:
                self._sums[-1].add_(self.total, alpha=self.first_weight)
            self._waiting = [unequal + self.first_weight for unequal in self._waiting]
            self.first_weight = 0.0
        self._sum_waiting(torch.promote_types(self.dtype, torch.float32))
        nothing = dict.fromkeys(("found", "_updates", "_squares", "_sent", "_start"))
        # As ndarrays they travel through shared memory; as tensors they would be copied.
        return self.__dict__ | nothing | {"_sums": self._sums.cpu().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums=torch.from_numpy(state["_sums"]))

    def _add_unequal(self) -> None:
        """Let the last row be there from now on."""
        if self._uneven:
            return
        rows, size = self._sums.shape
        sums = self._sums.new_empty(rows + 1, size)
        if not self._empty:
            sums[:-1] = self._sums
            sums[-1] = 0.0
        self._sums, self._uneven = sums, True

    def _sum_short(self, weights: Tensor, unequal: float) -> None:
        """Let a short vector into the sums at once, while it is in the cache."""
        update = torch.sub(self._start, weights).double()
        if self._empty:
            self._sums.zero_()
            self._empty = False
        self.total.add_(update)
        if self.alignment:
            square = torch.dot(update, update).item()
            self.squared_norms += square
            if square > 0:
                self.moved += 1
                self.directions.add_(update, alpha=square**-0.5)
        if unequal:
            self._add_unequal()
            self._sums[-1].add_(update, alpha=unequal)

    def _wait(self, weights: Tensor, unequal: float) -> None:
        """Put x - y and its squared norm where they wait."""
        place, width = len(self._waiting), _width(weights)
        if not place:
            self._updates = _room(weights.to(self.dtype))
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
            self.finish()

    def _sum_waiting(self, dtype: torch.dtype) -> None:
        """Let the updates that wait into the sums, and keep these in a dtype.

        A block of them is formed in float64, in the cache, and goes through memory rounded.
        """
        unequal, self._waiting = self._waiting, []
        if not unequal:
            self._sums = self._sums.to(dtype)
            return
        if any(unequal):
            self._add_unequal()
        squares = self._squares[: len(unequal)]
        factors = [torch.ones_like(squares)]
        if self.alignment:
            moved = squares > 0
            self.moved += int(moved.sum())
            self.squared_norms += squares.sum().item()
            factors.append(torch.where(moved, squares.rsqrt(), 0.0))
        if self._uneven:
            factors.append(squares.new_tensor(unequal))
        kept = self._sums
        if dtype != kept.dtype:
            self._sums = torch.empty_like(kept, dtype=dtype)
        weights, width = torch.stack(factors), 2 * _width(squares) // len(unequal)
        buffer = squares.new_empty(len(unequal), min(width, kept.shape[1]))
        updates, beta = self._updates[: len(unequal)], 0 if self._empty else 1
        for place, before, block in zip(
            *(each.split(width, dim=1) for each in (self._sums, kept, updates)), strict=True
        ):
            update = buffer[:, : block.shape[1]].copy_(block)
            place.copy_(torch.addmm(before.double(), weights, update, beta=beta))
        self._empty = False
        _spare[:] = [self._updates]
        self._updates = torch.empty(0)


def find(parts: Sequence[PartialSums], scale: float) -> Found:
    """Read the sums of parts in one pass.

    What they come to is kept with them: a strategy and whoever records the round both ask.

    Args:
        parts: at least one.
        scale: what the weighted sum of updates is multiplied with to be their mean.

    Returns:
        D and the squared norms.
    """
    for each in parts:
        each.finish()
    first = parts[0]
    known = first.found
    if known and known[:2] == (len(parts), scale) and all(each.found is known for each in parts):
        return known
    alike = len({each.first_weight for each in parts}) == 1 and not any(
        each.unequal is not None for each in parts
    )
    factor = first.first_weight * scale
    sums = [[(each.total, 1.0) for each in parts]]
    if first.alignment:
        sums.append([(each.directions, 1.0) for each in parts])
    if not alike:
        sums.append(_mean_terms(parts, scale))
    dtype = reduce(torch.promote_types, (each.dtype for each in parts))
    update = torch.empty_like(first.total, dtype=dtype)
    squares = [0.0, 0.0, 0.0]
    for place, total, *others in zip(update.split(_BLOCK), *map(_added, sums), strict=True):
        block_of_mean = total * factor if alike else others.pop()
        place.copy_(block_of_mean)
        for index, block in enumerate((block_of_mean, total, *others)):
            squares[index] += torch.dot(block, block).item()
    found = Found(len(parts), scale, update, squares[0] ** 0.5, *squares[1:])
    for each in parts:
        each.found = found
    return found


def mean(parts: Sequence[PartialSums], scale: float) -> Tensor:
    """Return the mean of the parts' updates in float64; arguments as for `find`."""
    for each in parts:
        each.finish()
    return torch.cat(list(_added(_mean_terms(parts, scale))))


def inner_product(first: Tensor, second: Tensor) -> float:
    """The inner product of two vectors, formed in float64."""
    blocks = zip(first.split(_BLOCK), second.split(_BLOCK), strict=True)
    return sum(torch.dot(one.double(), other.double()).item() for one, other in blocks)


def _mean_terms(parts: Sequence[PartialSums], scale: float) -> list[tuple[Tensor, float]]:
    terms = [(each.total, each.first_weight * scale) for each in parts]
    return terms + [(each.unequal, scale) for each in parts if each.unequal is not None]


def _added(terms: Sequence[tuple[Tensor, float]]) -> Iterator[Tensor]:
    """Yield the blocks of a sum of vectors times factors."""
    (_, first), *_ = terms
    for block, *others in zip(*(vector.split(_BLOCK) for vector, _ in terms), strict=True):
        total = block.double() if first == 1.0 else block.double() * first
        for other, (_, factor) in zip(others, terms[1:], strict=True):
            total = torch.add(total, other.double(), alpha=factor)
        yield total


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


def _width(vectors: Tensor) -> int:
    return _GPU_BLOCK if vectors.is_cuda else _BLOCK
