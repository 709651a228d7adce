"""Running sums over one process's part of a cohort's updates, and what all parts come to.

A pass through vectors that lie in memory is what takes time here: updates go through the sums
several at a time, long ones block by block, and the sums of all parts are read once, together.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedinit.device import full_precision

_TOGETHER = 32  # updates that go through the sums together: one pass through memory serves all
_GPU_TOGETHER = 128  # likewise on a GPU, where a pass costs its launches
_ROOM_BYTES = 400 << 20  # that updates may wait in; long ones go through the sums in smaller groups
_PIECE = 1 << 10  # elements whose squares are added up in their own dtype, and then in float64
_TINY = 1e-30  # of what is added up in float32, a part may have been too small for it below this
_BLOCK = 1 << 17  # elements of a block: what is made of it stays in a core's cache
_GPU_BLOCK = 1 << 22  # likewise on a GPU, where a block costs its launches
_READ_BLOCK = 1 << 20  # where the sums are read, by all cores: a block costs these their start


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

    Some updates are added up in their own dtype, at least float32, to which y_i was rounded; these
    sums in float64. They are rounded again when they travel to another process, and are read there
    with those of others, in that dtype.

    Args:
        start: x, as the first client got it.
        weights: that client's y; where it lies, the sums lie. The dtype is that of x - y.
        weight: its w.
        alignment: whether to sum what gradient diversity and the cosines need.

    Attributes:
        dtype: of the updates.
        size: elements of each.
        weight: of every client; None if they differ.
        moved: clients whose update is not zero.
        squared_norms: Q = sum ||D_i||^2.
        found: what the sums came to, last, with those of other parts.
    """

    def __init__(self, start: Tensor, weights: Tensor, weight: float, alignment: bool) -> None:
        self.dtype = torch.promote_types(start.dtype, weights.dtype)
        self.size = len(weights)
        self.weight: float | None = weight
        self.alignment = alignment
        self.moved = 0
        self.squared_norms = 0.0
        self.found: Found | None = None
        # Rows: S = sum D_i; U = sum D_i / ||D_i||; W = sum w_i D_i, not there while w_i are alike.
        self._sums = torch.empty(0)  # none yet
        self._waiting: list[float] = []  # w_i of updates that are not yet in the sums
        self._room: _Room | None = None  # where these are
        self._x: Tensor | None = None  # as it was sent
        self._x_blocks: tuple[Tensor, ...] = ()  # where the sums lie
        self._y: Tensor | None = None  # the last client's: often the same tensor for each
        self._y_blocks: tuple[Tensor, ...] = ()

    @property
    def rows(self) -> Tensor:
        """S, and U if it is formed; zeros fill the last piece."""
        self.finish()
        return self._sums[: 1 + self.alignment]

    @property
    def weighted(self) -> tuple[Tensor, float]:
        """A vector, as long as the rows, and what to multiply it with to be sum w_i D_i."""
        self.finish()
        return (self._sums[-1], 1.0) if self.weight is None else (self._sums[0], self.weight)

    def add(self, start: Tensor, weights: list[Tensor], factors: list[float]) -> None:
        """Add the updates of clients that made y of x; what they made may change afterwards.

        Those of several go through together: on a GPU that takes as long as one of them.

        Args:
            start: x.
            weights: y of each.
            factors: w of each.
        """
        self.found = None
        alone = len(weights) == 1
        while weights:
            if self._room is None:
                dtype = torch.promote_types(self.dtype, torch.float32)
                self._room = _Room.of(weights[0], dtype)
            room, begun = self._room, len(self._waiting)
            if self._x is not start:
                self._x, self._x_blocks = start, room.blocks(start.to(room.updates))
            free = len(room.places) - begun
            if alone:
                if self._y is not weights[0]:
                    self._y, self._y_blocks = weights[0], room.blocks(weights[0])
                place, y_blocks = room.places[begun], self._y_blocks
            else:
                rows = slice(begun, begun + len(weights[:free]))
                places = room.updates[rows, : self.size].unbind()
                torch._foreach_copy_(places, weights[:free])
                place = room.at(rows)
                y_blocks = tuple(y for y, _, _ in place)
            for x, y, (update, pieces, norms) in zip(self._x_blocks, y_blocks, place, strict=True):
                torch.sub(x, y, out=update)
                if self.alignment:  # while it is in the cache
                    torch.linalg.vector_norm(pieces, dim=-1, out=norms)
            self._waiting += factors[:free]
            weights, factors = weights[free:], factors[free:]
            if len(self._waiting) == len(room.places):
                self.finish()

    def finish(self) -> None:
        """Let the updates that wait into the sums."""
        weights, room, self._waiting, self._room = self._waiting, self._room, [], None
        if room is None:
            return
        if self.weight is not None and set(weights) != {self.weight}:
            if len(self._sums):
                self._sums = torch.cat([self._sums, self._sums[:1] * self.weight])
            self.weight = None
        updates, factors = room.updates[: len(weights)], [[1.0] * len(weights)]
        if self.alignment:
            squares = _squares(updates, room.norms[: len(weights)])
            self.moved += sum(each > 0 for each in squares)
            self.squared_norms += sum(squares)
            factors.append([each**-0.5 if each > 0 else 0.0 for each in squares])
        if self.weight is None:
            factors.append(weights)
        by_row = updates.new_tensor(factors)
        with full_precision():
            first = not len(self._sums)
            shape = len(by_row), updates.shape[1]
            self._sums = updates.new_empty(shape) if first else self._sums.double()
            for sums, block in zip(room.blocks(self._sums), room.blocks(updates), strict=True):
                if first:  # block by block, too: a long product takes half as long again
                    torch.mm(by_row, block, out=sums)
                else:
                    sums.add_(by_row @ block)
        room.leave()

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels; no more digits than that are kept here."""
        self.finish()
        self._sums = self._sums.to(torch.promote_types(self.dtype, torch.float32))
        blocks = {"_x": None, "_x_blocks": (), "_y": None, "_y_blocks": ()}
        # As ndarrays they travel through shared memory; as tensors they would be copied.
        return self.__dict__ | blocks | {"found": None, "_sums": self._sums.cpu().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums=torch.from_numpy(state["_sums"]))


class _Room:
    """Room where updates wait.

    It is kept for others like them: the kernel's first touch of new memory, and the views, cost
    more than the sums.

    Args:
        weights: a vector like them.
        dtype: theirs.

    Attributes:
        updates: a row of whole pieces for each; zeros fill the last.
        norms: of their pieces.
        places: the blocks of each row.
    """

    def __init__(self, weights: Tensor, dtype: torch.dtype) -> None:
        size = len(weights)
        pieces = -(-size // _PIECE)
        # How many they are depends on model and device alone: so, then, do the sums' last digits.
        most = _ROOM_BYTES // (dtype.itemsize * pieces * _PIECE)
        rows = max(1, min(_GPU_TOGETHER if weights.is_cuda else _TOGETHER, most))
        self._like = size, dtype, weights.device
        self.updates = weights.new_empty(rows, pieces * _PIECE, dtype=dtype)
        self.updates[:, size:] = 0.0
        self.norms = self.updates.new_empty(rows, pieces)
        self.places = [self.at(row) for row in range(rows)]

    def at(self, rows: int | slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the blocks of some rows: the updates', their pieces, and these pieces' norms."""
        (size, _, _), updates, norms = self._like, self.updates[rows], self.norms[rows]
        return list(
            zip(
                self.blocks(updates[..., :size]),
                map(_pieces, self.blocks(updates)),
                norms.split(_width(updates) // _PIECE, dim=-1),
                strict=True,
            )
        )

    @staticmethod
    def blocks(vectors: Tensor) -> tuple[Tensor, ...]:
        """Return vectors block by block."""
        return vectors.split(_width(vectors), dim=-1)

    @staticmethod
    def of(weights: Tensor, dtype: torch.dtype) -> "_Room":
        """Return the one that was left, if it fits, or a new one."""
        like = len(weights), dtype, weights.device
        left, _left[:] = [each for each in _left if each._like == like], []
        return left[0] if left else _Room(weights, dtype)

    def leave(self) -> None:
        """Nothing waits here any longer."""
        _left[:] = [self]


_left: list[_Room] = []  # one, at the most


def find(parts: Sequence[PartialSums], scale: float) -> Found:
    """Read the sums of parts, together.

    What they come to is kept with them: a strategy and whoever records the round both ask.

    Args:
        parts: at least one.
        scale: what the weighted sum of updates is multiplied with to be their mean.

    Returns:
        D and the squared norms.
    """
    rows = [each.rows for each in parts]
    known = parts[0].found
    if known and known[:2] == (len(parts), scale) and all(each.found is known for each in parts):
        return known
    common = min(map(len, rows))  # without U, if there is a part that has none
    sums = [(each[:common], 1.0) for each in rows]
    means = [(vector[None], factor) for vector, factor in _mean_terms(parts, scale)]
    update = rows[0].new_empty(parts[0].size, dtype=_widest(each.dtype for each in parts))
    dtype, factor = _widest(each.dtype for each in rows), means[0][1]
    if parts[0].weight is not None and len({each.weight for each in parts}) == 1:  # D = factor S
        total, *directions = _read(sums, dtype, update, factor)
        squared_norm = factor**2 * total
    else:
        total, *directions = _read(sums, dtype)
        (squared_norm,) = _read(means, dtype, update)
    found = Found(len(parts), scale, update, squared_norm**0.5, total, sum(directions, 0.0))
    for each in parts:
        each.found = found
    return found


def mean(parts: Sequence[PartialSums], scale: float) -> Tensor:
    """Return the mean of the parts' updates in float64; arguments as for `find`."""
    return torch.cat(list(_added(_mean_terms(parts, scale), torch.float64)))[: parts[0].size]


def inner_product(first: Tensor, second: Tensor) -> float:
    """The inner product of two vectors; blocks of it are added up in float64."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    blocks = zip(first.to(dtype).split(_BLOCK), second.to(dtype).split(_BLOCK), strict=True)
    found = sum(torch.dot(one, other).item() for one, other in blocks)
    if _TINY < abs(found) < math.inf:
        return found
    return torch.dot(first.double(), second.double()).item()


def _mean_terms(parts: Sequence[PartialSums], scale: float) -> list[tuple[Tensor, float]]:
    """Return the vectors of which the mean is the sum, each with its factor."""
    return [(vector, factor * scale) for vector, factor in (each.weighted for each in parts)]


def _read(
    terms: Sequence[tuple[Tensor, float]],
    dtype: torch.dtype,
    update: Tensor | None = None,
    factor: float = 1.0,
) -> list[float]:
    """Return the squared norms of a sum's rows; write the first, times a factor, to `update`."""
    squares: list[list[float]] = []
    for number, block in enumerate(_added(terms, dtype)):
        squares.append(_squares(block))
        if update is not None:
            place = update[number * _READ_BLOCK :][:_READ_BLOCK]
            torch.mul(block[0, : len(place)], factor, out=place)
    return [sum(each) for each in zip(*squares, strict=True)]


def _added(terms: Sequence[tuple[Tensor, float]], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the blocks of a sum of vectors, or of rows of them, times factors; to read alone."""
    vectors = [vector.split(_READ_BLOCK, dim=-1) for vector, _ in terms]
    (_, first), *others = terms
    for block, *further in zip(*vectors, strict=True):
        total = block.to(dtype) if first == 1.0 else block.to(dtype) * first
        for each, (_, factor) in zip(further, others, strict=True):
            total = torch.add(total, each, alpha=factor)
        yield total


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _squares(rows: Tensor, norms: Tensor | None = None) -> list[float]:
    """Return the squared norms of rows of whole pieces; `norms`: those of the pieces, if known."""
    if norms is None:
        norms = torch.linalg.vector_norm(_pieces(rows), dim=-1)
    squares = norms.double().square().sum(-1).tolist()  # a GPU is waited for once
    for place, found in enumerate(squares):
        if not _TINY < found < math.inf:
            row = rows[place].flatten().double()
            squares[place] = torch.dot(row, row).item()
    return squares


def _pieces(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (-1, _PIECE))


def _width(vectors: Tensor) -> int:
    return _GPU_BLOCK if vectors.is_cuda else _BLOCK
