"""Data for the benchmark's fixed work: seeded noise, as the clients' sizes are all that matters."""

import numpy as np
import torch

from fedinit.data import FederatedDataset

_TEST_ROWS = 100


def noise(
    clients: int,
    examples: int,
    shape: list[int],
    classes: int,
    skew: float = 0.0,
) -> FederatedDataset:
    """Return images of noise with random labels, dealt to clients one after another.

    Args:
        clients: number of clients.
        examples: of a client; with `skew` their mean.
        shape: of an image, channels first.
        classes: number of labels.
        skew: standard deviation of the log of the clients' sizes, which are then log-normal.
    """
    rng = np.random.default_rng(0)
    sizes = np.full(clients, examples)
    if skew:
        drawn = rng.lognormal(sigma=skew, size=clients)
        sizes = np.maximum(1, np.round(drawn * (examples * clients / drawn.sum()))).astype(int)
    ends = np.cumsum(sizes)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((int(ends[-1]), *shape), generator=generator)
    targets = torch.randint(classes, (len(inputs),), generator=generator)
    width = len(str(clients))  # so that the ids sort as their numbers do
    owned = {
        f"{client:0{width}d}": np.arange(end - size, end)
        for client, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }
    test = inputs[:_TEST_ROWS], targets[:_TEST_ROWS]
    return FederatedDataset(inputs, targets, owned, *test, classes)
