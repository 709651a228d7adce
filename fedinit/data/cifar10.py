"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images 32x32 in 10 classes."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from fedinit.data.federated_dataset import FederatedDataset
from fedinit.data.images import read_images
from fedinit.data.sources import find
from fedinit.errors import RequestError, named

HUB = "uoft-cs/cifar10"


def cifar10(data_dir: str | None = None) -> FederatedDataset:
    """CIFAR-10, 32x32 colour images in 10 classes; no natural clients (iid or dirichlet).

    Args:
        data_dir: a folder with the hub's parquet files (train-*.parquet, test-*.parquet) or with
            the original cifar-10-batches-py; by default the data are fetched from the hub once.

    Raises:
        RequestError: the data are missing, cannot be had, or are damaged.
    """
    train = _split(data_dir, "train", "data_batch_*")
    test = _split(data_dir, "test", "test_batch")
    return FederatedDataset(*train, None, *test)


def _split(data_dir: str | None, split: str, original: str) -> tuple[Tensor, Tensor]:
    if data_dir is None:
        return read_images((HUB, split), "img", "label")
    files = find(data_dir, f"{split}-*.parquet", original)
    if files[0].suffix == ".parquet":
        return read_images(files, "img", "label")
    parts = [_read_batch(path) for path in files]
    images, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return from_numpy(images), from_numpy(targets)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a batch of the original's Python version: a pickled dict of `data` and `labels`."""
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        targets = np.asarray(batch[b"labels"], dtype=np.int64).reshape(len(images))
    except Exception as error:  # whatever a damaged pickle makes the reader raise
        raise RequestError(f"{path}: not a batch of cifar-10-batches-py: {named(error)}") from None
    return images, targets


class _ArraysOnly(pickle.Unpickler):
    """Refuses a pickle that names anything but numpy's arrays, before that is run."""

    _ARRAYS = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        """Return what builds an array.

        Raises:
            pickle.UnpicklingError: the pickle names something else.
        """
        of_numpy = module.partition(".")[0] == "numpy" and name in self._ARRAYS
        if of_numpy or (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
