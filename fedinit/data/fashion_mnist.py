"""Fashion-MNIST (Xiao et al. 2017), the embedded sample: 6,000 + 1,000 images, 10 classes."""

from fedinit.assets import asset
from fedinit.data.federated_dataset import FederatedDataset
from fedinit.data.images import read_images


def fashion_mnist() -> FederatedDataset:
    """Clothing, 28x28 grey images in 10 classes; no natural clients (iid or dirichlet)."""
    train, test = (
        read_images([asset(f"fashion-mnist-{split}.parquet")], "image", "label")
        for split in ("train", "test")
    )
    return FederatedDataset(*train, None, *test)
