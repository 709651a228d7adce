"""Data sets and partitions."""

from collections.abc import Callable

from fedinit.data.cifar10 import cifar10
from fedinit.data.fashion_mnist import fashion_mnist
from fedinit.data.federated_dataset import ClientRows, FederatedDataset
from fedinit.data.femnist import femnist
from fedinit.data.partitions import PARTITIONS, partitioned, with_validation
from fedinit.data.reddit import reddit
from fedinit.data.shakespeare import shakespeare, shakespeare_texts
from fedinit.data.stackoverflow import stackoverflow
from fedinit.data.text import TextDataset
from fedinit.data.wikitext import wikitext

DATASETS: dict[str, Callable[..., FederatedDataset]] = {
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "femnist": femnist,
    "reddit": TextDataset(reddit),
    "shakespeare": shakespeare,
    "shakespeare-texts": TextDataset(shakespeare_texts),
    "stackoverflow": TextDataset(stackoverflow),
    "wikitext": TextDataset(wikitext),
}
EMBEDDED = frozenset({"fashion-mnist", "shakespeare", "shakespeare-texts"})

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "PARTITIONS",
    "ClientRows",
    "FederatedDataset",
    "partitioned",
    "with_validation",
]
