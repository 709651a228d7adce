"""Named tensors <-> one flat vector <-> Flower's ArrayRecord, with no copy that nobody reads.

Flower keeps arrays encoded: every reader decodes, every writer encodes. Within one process, and
between processes that share memory, that is most of a message's cost. The two classes here look
like Flower's own to any strategy or ClientApp, and are encoded only when their bytes are asked for.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from math import prod
from typing import Any

import flwr.app
import numpy as np
import torch
from torch import Tensor, nn

from fedinit.errors import RequestError

# Ray hands out arrays in shared memory as read-only; nothing here writes to a received array.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Array(flwr.app.Array):
    """A Flower Array around an ndarray, encoded when its bytes are asked for and not before.

    It bears Flower's class name because Flower writes that name on the wire.

    Args:
        ndarray: the values, or what returns them when they are asked for.
        dtype, shape: needed with what returns them.
    """

    def __init__(
        self,
        ndarray: np.ndarray | Callable[[], np.ndarray],
        dtype: str = "",
        shape: tuple[int, ...] = (),
    ) -> None:
        if isinstance(ndarray, np.ndarray):
            dtype, shape = str(ndarray.dtype), tuple(ndarray.shape)
        # Flower's __setattr__ keeps book of what is to be encoded again: nothing is encoded here.
        self.__dict__.update(dtype=dtype, shape=shape, stype="numpy.ndarray", values=ndarray)

    def read(self) -> np.ndarray:
        """Return the values, to read and not to write to."""
        values = self.__dict__["values"]
        return values() if callable(values) else values

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in Flower's encoding."""
        return flwr.app.Array(self.read()).data

    def numpy(self) -> np.ndarray:
        """Return a copy, which the caller may write to, as Flower's decoding gives."""
        return self.read().copy()


def tensor(array: flwr.app.Array) -> Tensor:
    """Return an array's values as a tensor to read; it may share memory with the array."""
    return torch.from_numpy(array.read() if isinstance(array, Array) else array.numpy())


def in_head(name: str, head: str | None) -> bool:
    """Whether an array is in a model's head, which is named by its arrays' prefix, or is one."""
    return head is not None and (name == head or name.startswith(f"{head}."))


def size_in_bytes(record: flwr.app.ArrayRecord) -> int:
    """Return the bytes that a record's arrays take; none is encoded or made for it."""
    return sum(
        prod(each.shape) * np.dtype(each.dtype).itemsize
        if isinstance(each, Array)
        else len(each.data)
        for each in record.values()
    )


class ArrayRecord(flwr.app.ArrayRecord):
    """An ArrayRecord whose trainable arrays are views of one vector, `flat`.

    Whoever changes an entry gets a plain record: `flat` is then None and readers look at the
    entries. It travels between processes as its vector, in one piece.

    Attributes:
        sums: the CohortSums that the arrays are the mean of, if they are one.
    """

    sums: Any = None
    _parts: tuple["Layout", Callable[[], Tensor], Mapping[str, Tensor]] | None = None

    @property
    def flat(self) -> Tensor | None:
        """The vector, to read and not to write to."""
        return None if self._parts is None else self._parts[1]()

    def __setitem__(self, key: str, value: flwr.app.Array) -> None:
        self._forget()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._forget()
        super().__delitem__(key)

    def copy(self) -> "ArrayRecord":
        """Return a record that can be changed without changing this one; arrays are shared."""
        new = super().copy()
        new.sums, new._parts = self.sums, self._parts
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._parts is None:
            return super().__reduce_ex__(protocol)
        layout, vector, rest = self._parts
        arrays = {name: value.numpy() for name, value in rest.items()}
        return _rebuild, (layout, vector().numpy(), arrays)

    def _forget(self) -> None:
        self.sums = self._parts = None


def _rebuild(layout: "Layout", flat: np.ndarray, rest: dict[str, np.ndarray]) -> ArrayRecord:
    return layout.record(
        torch.from_numpy(flat), {name: torch.from_numpy(value) for name, value in rest.items()}
    )


def _part(vector: Callable[[], Tensor], place: slice, shape: tuple[int, ...]) -> np.ndarray:
    return vector()[place].view(shape).numpy()


@dataclass(frozen=True)
class Layout:
    """Where a model's arrays lie: the trainable ones in one flat vector, the rest by name.

    Attributes:
        shapes: every parameter and persistent buffer, in state-dict order, with its shape.
            A tied parameter is listed once, under its first name.
        trainable: the names of the parameters that are trained, in the vector's order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """Lay out a model; the parameters with `requires_grad` are the trainable ones.

        Raises:
            RequestError: nothing is trainable, the trainable parameters differ in dtype or are
                complex, one has no shape yet, or an array's dtype is none of NumPy's, and so of
                Flower's.
        """
        parameters = dict(model.named_parameters())
        for name, value in parameters.items():
            if nn.parameter.is_lazy(value):
                raise RequestError(
                    f"model: '{name}' has no shape before a first batch; give it one"
                )
        trainable = tuple(name for name, value in parameters.items() if value.requires_grad)
        dtypes = {parameters[name].dtype for name in trainable}
        if len(dtypes) != 1:
            found = ", ".join(sorted(map(str, dtypes))) or "no trainable parameter"
            raise RequestError(f"model: trainable parameters must have one dtype, found {found}")
        if (dtype := dtypes.pop()).is_complex:
            raise RequestError(f"model: trainable parameters must be real numbers, found {dtype}")
        named = parameters | dict(model.named_buffers())
        arrays = {name: value for name, value in model.state_dict().items() if name in named}
        for name, value in arrays.items():
            try:
                torch.empty(0, dtype=value.dtype).numpy()
            except TypeError:
                raise RequestError(
                    f"model: '{name}' is {value.dtype}, which Flower's arrays cannot hold"
                ) from None
        return cls({name: tuple(value.shape) for name, value in arrays.items()}, trainable)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each trainable array, in the vector's order."""
        return [prod(self.shapes[name]) for name in self.trainable]

    @cached_property
    def _places(self) -> dict[str, slice]:
        ends = list(accumulate(self.sizes))
        return {
            name: slice(end - size, end)
            for name, size, end in zip(self.trainable, self.sizes, ends, strict=True)
        }

    @cached_property
    def fixed(self) -> list[str]:
        """The names outside the vector: frozen parameters and buffers."""
        return [name for name in self.shapes if name not in self._places]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector into views of the trainable arrays' shapes."""
        parts = flat.split(self.sizes)
        return [
            part.view(self.shapes[name]) for name, part in zip(self.trainable, parts, strict=True)
        ]

    def flatten(self, record: flwr.app.ArrayRecord) -> Tensor:
        """Return a record's trainable arrays as one vector, to read and not to write to.

        Raises:
            RequestError: an array is missing or has another shape.
        """
        if isinstance(record, ArrayRecord) and (flat := record.flat) is not None:
            return flat
        return torch.cat([self._read(record, name).reshape(-1) for name in self.trainable])

    def rest(self, record: flwr.app.ArrayRecord) -> dict[str, Tensor]:
        """Return a record's arrays outside the vector, to read and not to write to."""
        return {name: self._read(record, name) for name in self.fixed}

    def record(self, flat: Tensor, rest: Mapping[str, Tensor]) -> ArrayRecord:
        """Build the record of a flat vector and the arrays outside it; both are shared with it."""
        return self._record(lambda: flat, flat.dtype, rest)

    def later(
        self, make: Callable[[], Tensor], dtype: torch.dtype, rest: Mapping[str, Tensor]
    ) -> ArrayRecord:
        """Build the record of a flat vector that is made when somebody reads it, once."""
        return self._record(cache(make), dtype, rest)

    def _record(
        self, vector: Callable[[], Tensor], dtype: torch.dtype, rest: Mapping[str, Tensor]
    ) -> ArrayRecord:
        record, name_of_dtype = ArrayRecord(), str(dtype).removeprefix("torch.")
        for name, shape in self.shapes.items():
            place = self._places.get(name)
            if place is None:
                array = Array(rest[name].numpy())
            else:
                array = Array(partial(_part, vector, place, shape), name_of_dtype, shape)
            flwr.app.ArrayRecord.__setitem__(record, name, array)
        record._parts = (self, vector, dict(rest))
        return record

    def record_of(self, model: nn.Module) -> ArrayRecord:
        """Build the record of a copy of a model's weights."""
        state = {
            name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()
        }
        flat = torch.cat([state[name].reshape(-1) for name in self.trainable])
        return self.record(flat, {name: state[name] for name in self.fixed})

    def named(self, record: flwr.app.ArrayRecord) -> dict[str, Tensor]:
        """Return a record's arrays by name, in state-dict order."""
        return {name: self._read(record, name) for name in self.shapes}

    def is_finite(self, record: flwr.app.ArrayRecord) -> bool:
        """Whether every entry of a record's float arrays is a finite number: one pass over them."""
        arrays = [self.flatten(record), *self.rest(record).values()]
        ends = [
            torch.stack(torch.aminmax(each))  # both are NaN if an entry is
            for each in arrays
            if each.is_floating_point() and each.numel()
        ]
        return all(bool(torch.isfinite(each).all()) for each in ends)

    def _read(self, record: flwr.app.ArrayRecord, name: str) -> Tensor:
        if name not in record:
            raise RequestError(f"arrays: '{name}' is missing; got {', '.join(record) or 'none'}")
        value = tensor(record[name])
        if tuple(value.shape) != self.shapes[name]:
            raise RequestError(
                f"arrays: '{name}' has shape {tuple(value.shape)}, expected {self.shapes[name]}"
            )
        return value
