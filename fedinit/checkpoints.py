"""A checkpoint: plain data and tensors in one .safetensors file that knows whether it is whole.

The tensors are the file's own; what holds them together (numbers, text, nested lists and mappings,
Flower's records) is JSON in the file's metadata, and so is the SHA-256 of both. Nothing in such a
file is ever run, and its header is checked against its size before memory is taken.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flwr.app
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedinit.errors import one_line

RECORD, CHECKSUM = "fedinit", "sha256"  # keys of the file's metadata
_PLAIN = (type(None), bool, int, float, str)


class UnsavableError(TypeError):
    """A value is neither plain data nor a tensor; the text names it."""


class DamagedError(ValueError):
    """A file is not the checkpoint that was written; the text says in what."""


def encode(content: Any) -> bytes:
    """Return the file that holds `content`: None, numbers, text, bytes, ndarrays, tensors, Flower's
    records, and lists, tuples and dicts of these.

    Raises:
        UnsavableError: `content` holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    record = json.dumps(_pack(content, "", tensors))
    metadata = {RECORD: record, CHECKSUM: _checksum(record, tensors)}
    try:
        return save(tensors, metadata)
    except KeyError as error:  # complex numbers, say
        raise UnsavableError(f"tensors of {one_line(error)} cannot be saved") from None


def decode(path: Path) -> Any:
    """Return what `encode` was given.

    Raises:
        DamagedError: the file is missing, damaged, or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies lie as torch's own tensors do: torch.dot's last digits depend on where.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        record = metadata[RECORD]
        if metadata[CHECKSUM] != _checksum(record, tensors):
            raise DamagedError("its checksum is wrong")
        return _unpack(json.loads(record), tensors)
    except DamagedError:
        raise
    except Exception as error:  # whatever the readers raise on a damaged file
        raise DamagedError(f"not readable: {one_line(error)}") from None


def _checksum(record: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON: plain data and lists as they are, {kind: content} for the rest."""

    def inner(items: Iterable[tuple[Any, Any]]) -> list[list[Any]]:
        return [
            [key, _pack(each, f"{path}/{key}".removeprefix("/"), tensors)] for key, each in items
        ]

    kind = type(value).__name__
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        packed = [each for _, each in inner(enumerate(value))]
        return packed if kind == "list" else {kind: packed}
    if type(value) is bytes:
        return {kind: value.hex()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        name = path
        while name in tensors:  # a key may hold a slash
            name += "'"
        tensors[name] = _contiguous(value, path)
        return {_tensor_kind(value): name}
    if isinstance(value, ArrayRecord):
        kind, value = "ArrayRecord", {name: each.numpy() for name, each in value.items()}
    if kind not in _MAPPINGS or not all(type(key) in _PLAIN for key in value):
        raise UnsavableError(f"{path} is a {kind} that a checkpoint cannot hold")
    return {kind: inner(value.items())}


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind in _TENSORS:
        return _TENSORS[kind](tensors[held])
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]({key: _unpack(each, tensors) for key, each in held})
    return bytes.fromhex(held) if kind == "bytes" else tuple(_unpack(held, tensors))


def _array_record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: flwr.app.Array(each) for name, each in arrays.items()})


_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "Tensor": lambda value: value,
    "ndarray": lambda value: value.numpy(),
    "scalar": lambda value: value.numpy()[()],
}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ArrayRecord": _array_record,
    "MetricRecord": MetricRecord,
    "ConfigRecord": ConfigRecord,
    "RecordDict": RecordDict,
}


def _tensor_kind(value: Tensor | np.ndarray | np.generic) -> str:
    if isinstance(value, Tensor):
        return "Tensor"
    return "ndarray" if isinstance(value, np.ndarray) else "scalar"


def _contiguous(value: Tensor | np.ndarray | np.generic, path: str) -> Tensor:
    """Return a tensor in memory of its own: two names may share what they hold."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError as error:  # text, objects
        raise UnsavableError(f"{path}: {one_line(error)}") from None
