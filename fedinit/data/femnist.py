"""FEMNIST (Caldas et al. 2018): handwritten characters by writer, 28x28 grey, 62 classes."""

from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy

from fedinit.data import leaf
from fedinit.data.clients import Choice, held_out_clients
from fedinit.data.federated_dataset import ClientRows, FederatedDataset
from fedinit.data.images import read_owned_images
from fedinit.data.sources import find, hashed
from fedinit.errors import RequestError, one_line

HUB, CLASSES, SIDE = "flwrlabs/femnist", 62, 28
_TRAIN, _TEST = "train/*.json", "test/*.json"


def femnist(
    data_dir: str | None = None,
    max_clients: int | None = None,
    min_examples: int = 1,
    max_examples_per_client: int | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> FederatedDataset:
    """Handwritten characters, 28x28 grey images in 62 classes, by writer (natural clients).

    Args:
        data_dir: a folder with the hub's parquet files (train-*.parquet), or with LEAF's
            train/*.json and test/*.json, whose own split is kept; by default the data are fetched
            from the hub once.
        max_clients: at most so many writers.
        min_examples: writers with fewer images are left out.
        max_examples_per_client: at most so many images of each writer.
        test_share: share of the chosen writers whose images are the test set (not for LEAF).
        seed: of these draws; the same for all runs.

    Raises:
        RequestError: the data are missing, cannot be had, or are damaged, or a number is wrong.
    """
    choice = Choice(max_clients, min_examples, max_examples_per_client, seed)
    files = [] if data_dir is None else find(data_dir, "train-*.parquet", _TRAIN)
    if files and files[0].suffix == ".json":
        images, labels, owners = _read_leaf(files)
        rows = choice.rows(owners)
        test_images, test_labels, _ = _read_leaf(find(str(data_dir), _TEST))
        train = (images[rows], labels[rows], owners[rows])
        return _dataset(train, (test_images, test_labels))
    source = files or (HUB, "train")
    images, labels, names = read_owned_images(source, "image", "character", "writer_id")
    owners = np.array([hashed(name) for name in names])
    rows = choice.rows(owners)
    test = held_out_clients(owners[rows], test_share, seed)
    kept, held = rows[~test], rows[test]
    return _dataset((images[kept], labels[kept], owners[kept]), (images[held], labels[held]))


def _dataset(
    train: tuple[Tensor, Tensor, np.ndarray], test: tuple[Tensor, Tensor]
) -> FederatedDataset:
    images, labels, owners = train
    return FederatedDataset(images, labels, ClientRows.by_owner(owners), *test, num_classes=CLASSES)


def _read_leaf(paths: list[Path]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Read LEAF's images, 784 numbers in [0, 1] each, as uint8; and labels and hashed writers."""
    images, labels, owners = [], [], []
    for user, inputs, targets in leaf.users(paths):
        try:
            pixels = np.asarray(inputs, dtype=np.float64).reshape(-1, 1, SIDE, SIDE)
            if not all(type(label) is int for label in targets):
                raise ValueError("a label that is no whole number")
            labels.append(np.asarray(targets, dtype=np.int64).reshape(len(pixels)))
            if not ((pixels >= 0) & (pixels <= 1)).all():
                raise ValueError("a pixel outside [0, 1]")
        except (TypeError, ValueError) as error:
            raise RequestError(f"{paths[0].parent}: writer {user}: {one_line(error)}") from None
        images.append((pixels * 255).round().astype(np.uint8))
        owners.append(np.full(len(pixels), user))
    parts = (np.concatenate(images), np.concatenate(labels))
    return from_numpy(parts[0]), from_numpy(parts[1]), np.concatenate(owners)
