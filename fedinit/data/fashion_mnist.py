"""Fashion-MNIST (Xiao et al. 2017), the embedded sample: 6,000 + 1,000 images, 10 classes."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from fedinit.assets import asset
from fedinit.data.federated_dataset import FederatedDataset
from fedinit.errors import RequestError


def fashion_mnist() -> FederatedDataset:
    """Clothing, 28x28 grey images in 10 classes; no natural clients (iid or dirichlet)."""
    inputs, targets = _read(asset("fashion-mnist-train.parquet"))
    test_inputs, test_targets = _read(asset("fashion-mnist-test.parquet"))
    return FederatedDataset(inputs, targets, None, test_inputs, test_targets)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Read the hub's layout: image {bytes: PNG, path} and label; images as uint8 (n, 1, h, w)."""
    try:
        table = pq.read_table(path, columns=["image", "label"])
        images = [
            np.asarray(Image.open(io.BytesIO(image["bytes"].as_py()))) for image in table["image"]
        ]
        pixels = np.stack(images)[:, None]
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{path}: {' '.join(str(error).split())}") from None
    return torch.from_numpy(pixels), torch.from_numpy(table["label"].to_numpy().astype(np.int64))
