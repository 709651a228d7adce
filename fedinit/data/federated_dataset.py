"""A federated data set: rows held once, and which client owns which rows."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedinit.device import free_bytes
from fedinit.errors import RequestError, one_line

# A row's target, of several, that counts in no loss and no accuracy: torch's own ignore_index.
IGNORED = -100


class ClientRows(Mapping[str, np.ndarray]):
    """Client id -> row indices, sorted by id, in three columns however many the clients."""

    def __init__(self, ids: Sequence[str], rows: np.ndarray, offsets: np.ndarray) -> None:
        self.ids = list(ids)
        self.rows = rows
        self.offsets = offsets
        self._position = {client: index for index, client in enumerate(self.ids)}

    @classmethod
    def of(cls, clients: Mapping[str, Any]) -> "ClientRows":
        """Build from any mapping of client id to row indices.

        Raises:
            RequestError: a client's are something else than whole numbers in one row.
        """
        if isinstance(clients, ClientRows):
            return clients
        ids = sorted(clients)
        parts = [np.asarray(clients[client]) for client in ids]
        for client, part in zip(ids, parts, strict=True):
            if part.ndim != 1 or (part.size and part.dtype.kind not in "iu"):
                raise RequestError(
                    f"dataset: client '{client}' has {part.dtype} of shape {part.shape}, expected "
                    "row numbers (n,)"
                )
        sizes = [len(part) for part in parts]
        rows = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
        return cls(ids, rows, np.cumsum([0, *sizes]))

    @classmethod
    def by_owner(cls, owners: Sequence[str] | np.ndarray) -> "ClientRows":
        """Build from one owner for each row; a client's rows keep their order."""
        ids, owner = np.unique(np.asarray(owners), return_inverse=True)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(ids)))])
        return cls([str(name) for name in ids], np.argsort(owner, kind="stable"), offsets)

    def at(self, index: int) -> np.ndarray:
        """Return the rows of the client at a position in the sorted ids."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of rows of each client, by position."""
        return np.diff(self.offsets)

    def __getitem__(self, client: str) -> np.ndarray:
        return self.at(self._position[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class FederatedDataset:
    """Rows, their targets, the clients that own them, and a held-out test set.

    Args:
        inputs: tensor, rows first. uint8 is stored as it is and read as floats in [0, 1];
            other integers are read as int64; floats as they are.
        targets: tensor, rows first; integers are read as int64.
        clients: client id -> row indices; None when the data have no natural clients.
        test_inputs: held-out rows, like `inputs`.
        test_targets: held-out targets, like `targets`.
        num_classes: number of labels; by default counted from integer targets.
        labels: names what the labels mean, where another data set may have the same ones: trained
            heads fit only where this agrees, published ones of ImageNet where it is `imagenet`.
            None: no other has them.

    Raises:
        RequestError: a column is no tensor, rows and targets differ in number, a client has no row,
            or its row numbers are none or out of range.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        clients: Mapping[str, Any] | None,
        test_inputs: Tensor,
        test_targets: Tensor,
        num_classes: int | None = None,
        labels: str | None = None,
    ) -> None:
        columns = inputs, targets, test_inputs, test_targets
        for name, column in zip(_COLUMNS, columns, strict=True):
            if not isinstance(column, Tensor):
                raise RequestError(
                    f"dataset: {name} is a {type(column).__name__}, expected a torch.Tensor"
                )
        if len(inputs) != len(targets) or len(test_inputs) != len(test_targets):
            raise RequestError(
                f"dataset: {len(inputs)} rows with {len(targets)} targets, "
                f"{len(test_inputs)} test rows with {len(test_targets)} test targets"
            )
        if not len(test_inputs):
            raise RequestError("dataset: the test set is empty")
        self.folder: Path | None = None  # where the columns are mapped from
        self.device = torch.device("cpu")  # where batches are made
        self.inputs, self.targets = inputs, targets
        self.held_out: np.ndarray | None = None
        self.test_inputs, self.test_targets = test_inputs, test_targets
        self.clients = None if clients is None else ClientRows.of(clients)
        if num_classes is None and not targets.is_floating_point():
            num_classes = int(max(targets.max(), test_targets.max())) + 1
        self.num_classes = num_classes
        self.labels = labels
        if self.clients is not None:
            self._check(self.clients)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def owned(self) -> np.ndarray:
        """The rows that clients own, ascending: others are nobody's to train on."""
        return np.arange(len(self)) if self.clients is None else np.unique(self.clients.rows)

    def with_clients(
        self, clients: ClientRows, held_out: np.ndarray | None = None
    ) -> "FederatedDataset":
        """Return the same rows, shared, dealt to other clients.

        Args:
            clients: the clients.
            held_out: rows that no client trains on; if given, they stand in for the test set.
        """
        dealt = FederatedDataset(
            self.inputs,
            self.targets,
            clients,
            self.test_inputs,
            self.test_targets,
            self.num_classes,
            self.labels,
        )
        dealt.held_out, dealt.folder, dealt.device = held_out, self.folder, self.device
        return dealt

    def on(self, device: torch.device) -> "FederatedDataset":
        """Return the same data set, its batches on a device.

        On a GPU the rows lie there too if they take at most half of its free memory and fit into
        this process's share; otherwise they stay where they are, and each batch is moved.
        """
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.device = device
        columns = [self.__dict__[name] for name in _COLUMNS]
        if 2 * sum(each.numel() * each.element_size() for each in columns) <= free_bytes():
            with suppress(torch.OutOfMemoryError):
                moved.__dict__ |= {name: self.__dict__[name].to(device) for name in _COLUMNS}
        return moved

    def check_finite(self) -> None:
        """Check that every float of the rows and targets is a finite number: one pass over them.

        Raises:
            RequestError: one is not; its column and row are named.
        """
        for name in _COLUMNS:
            column = self.__dict__[name]
            if not column.is_floating_point() or not column.numel():
                continue
            if not torch.stack(column.aminmax()).isfinite().all():  # both are NaN if an entry is
                row = next(row for row, each in enumerate(column) if not each.isfinite().all())
                raise RequestError(f"dataset: {name}, row {row}: a number is not finite")

    def save(self, folder: Path) -> None:
        """Write the data set to a folder, to be opened by `open`.

        Each column is a tensor in Arrow's format; a column that is itself mapped, of an
        `np.memmap` say, is written without being held in memory.

        Raises:
            RequestError: a number is not finite, or the folder is not empty or cannot be written.
        """
        self.check_finite()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise RequestError(f"{folder}: not empty")
            columns = {name: self.__dict__[name].numpy() for name in _COLUMNS}
            if self.clients is not None:
                columns |= {"rows": self.clients.rows, "offsets": self.clients.offsets}
            for name, values in columns.items():
                with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file:
                    pa.ipc.write_tensor(pa.Tensor.from_numpy(values), file)
            ids = None if self.clients is None else self.clients.ids
            about = {"num_classes": self.num_classes, "labels": self.labels, "clients": ids}
            (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")  # last: it is whole
        except OSError as error:
            raise RequestError(f"{folder}: {one_line(error)}") from None

    @classmethod
    def open(cls, folder: Path) -> "FederatedDataset":
        """Open what `save` wrote: its rows stay in the files, mapped once for all processes.

        The workers open the same path, so they must be on this machine, or share it.

        Raises:
            RequestError: the folder does not hold a data set, or a file is damaged.
        """
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            inputs, targets, test_inputs, test_targets = (
                _mapped(folder, name) for name in _COLUMNS
            )
            ids, clients = about["clients"], None
            if ids is not None:
                rows, offsets = (_mapped(folder, name).numpy() for name in ("rows", "offsets"))
                clients = ClientRows(ids, rows, offsets)
            classes, labels = about["num_classes"], about["labels"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{folder}: not a saved data set: {one_line(error)}") from None
        opened = cls(inputs, targets, clients, test_inputs, test_targets, classes, labels)
        opened.folder = folder.resolve()
        return opened

    @property
    def test_size(self) -> int:
        """Number of rows that x is tested on."""
        return len(self.test_inputs) if self.held_out is None else len(self.held_out)

    @property
    def has_sequences(self) -> bool:
        """Whether a row has several labels to predict, as texts' tokens are."""
        return self.targets.ndim > 1 and not self.targets.is_floating_point()

    @property
    def owners(self) -> ClientRows:
        """The clients.

        Raises:
            RequestError: the data have no natural clients and were not partitioned.
        """
        if self.clients is None:
            raise RequestError(
                "partition.kind: this data set has no natural clients; valid: iid, dirichlet"
            )
        return self.clients

    def batch(self, rows: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of training rows, as a model reads them.

        Args:
            rows: row numbers (n,), or (k, n) for several batches at once.
        """
        index = torch.as_tensor(rows).to(self.inputs.device)
        return self._read(self.inputs[index], self.targets[index])

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return a slice of the test set, as a model reads it."""
        if self.held_out is not None:
            return self.batch(self.held_out[start:stop])
        return self._read(self.test_inputs[start:stop], self.test_targets[start:stop])

    def _read(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().div_(255)
        elif not inputs.is_floating_point():
            inputs = inputs.long()
        return inputs, targets if targets.is_floating_point() else targets.long()

    def _check(self, clients: ClientRows) -> None:
        if not len(clients):
            raise RequestError("dataset: there are no clients")
        empty = np.flatnonzero(clients.sizes == 0)
        if len(empty):
            raise RequestError(f"dataset: client '{clients.ids[empty[0]]}' has no rows")
        if clients.rows.min() < 0 or clients.rows.max() >= len(self.inputs):
            raise RequestError(
                f"dataset: client rows must lie in 0..{len(self.inputs) - 1}, "
                f"got {clients.rows.min()}..{clients.rows.max()}"
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is not None:  # the columns stay where they are
            return {name: value for name, value in self.__dict__.items() if name not in _COLUMNS}
        # As ndarrays the columns lie once in shared memory, for all workers of a machine.
        return self.__dict__ | {name: self.__dict__[name].numpy() for name in _COLUMNS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _COLUMNS:
            self.__dict__[name] = (
                torch.from_numpy(state[name]) if self.folder is None else _mapped(self.folder, name)
            )


def _mapped(folder: Path, name: str) -> Tensor:
    with pa.memory_map(str(folder / f"{name}.arrow")) as file:
        return torch.from_numpy(pa.ipc.read_tensor(file).to_numpy())


_ABOUT = "dataset.json"
_COLUMNS = ("inputs", "targets", "test_inputs", "test_targets")
