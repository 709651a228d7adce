"""How rows are dealt to clients: evenly at random, by skewed labels, or as they come."""

from collections.abc import Callable

import numpy as np

from fedinit.config import Partition
from fedinit.data.federated_dataset import ClientRows, FederatedDataset
from fedinit.errors import RequestError
from fedinit.randomness import Draw, keyed

_ROUNDING = 1e-9  # 0.29 of 100 rows are 29, in whatever digits the product is written


def iid(dataset: FederatedDataset, partition: Partition, seed: int) -> ClientRows:
    """Shuffled rows in equal shares; sizes differ by one at most."""
    rows = keyed(Draw.PARTITION, seed).permutation(dataset.owned)
    return _columns(rows, _equal_sizes(len(rows), partition.clients))


def dirichlet(dataset: FederatedDataset, partition: Partition, seed: int) -> ClientRows:
    """Equal shares with labels drawn from q ~ Dirichlet(alpha, ..., alpha), client by client.

    Hsu et al. 2019 (arXiv 1909.06335), section 3.1: each client draws its own label proportions q
    and takes its examples by q without replacement; a label that is used up leaves the draw and the
    others are renormalised. `alpha` is the concentration of each label, as is usual; in their own
    notation, with a uniform prior over K labels, it is alpha / K.
    """
    if dataset.targets.is_floating_point() or dataset.targets.ndim != 1:
        raise RequestError("partition.kind: dirichlet needs one integer label for each row")
    if dataset.targets.min() < 0:
        raise RequestError(
            f"partition.kind: dirichlet: a label is {dataset.targets.min()}, not 0.."
        )
    rng = keyed(Draw.PARTITION, seed)
    owned = dataset.owned
    labels = dataset.targets.numpy()[owned]
    order = rng.permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    ends = np.cumsum(counts)
    taken = ends - counts
    sizes = _equal_sizes(len(labels), partition.clients)
    rows = np.empty(len(labels), dtype=np.int64)
    start = 0
    for size in sizes:
        share = _draw_counts(rng, partition.alpha, size, ends - taken)
        chosen = [by_label[taken[k] : taken[k] + share[k]] for k in np.flatnonzero(share)]
        taken += share
        rows[start : start + size] = np.concatenate(chosen)
        start += size
    return _columns(owned[rows], sizes)


def natural(dataset: FederatedDataset, _partition: Partition, _seed: int) -> ClientRows:
    """The data's own clients: roles, writers, users."""
    return dataset.owners


PARTITIONS: dict[str, Callable[[FederatedDataset, Partition, int], ClientRows]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "natural": natural,
}


def partitioned(dataset: FederatedDataset, partition: Partition, seed: int) -> FederatedDataset:
    """Return the data set dealt to clients; each row that is owned goes to exactly one of them.

    Raises:
        RequestError: there are more clients than rows, or the data do not suit the partition.
    """
    if partition.kind != "natural" and partition.clients > (rows := len(dataset.owned)):
        raise RequestError(
            f"partition.clients: {partition.clients} clients cannot share {rows} rows"
        )
    return dataset.with_clients(PARTITIONS[partition.kind](dataset, partition, seed))


def with_validation(dataset: FederatedDataset, share: float, seed: int) -> FederatedDataset:
    """Hold out a share of each client's rows, rounded down; x is then tested on these.

    A row that is held out of one client is held out of all that own it, who may lose some more.

    Args:
        dataset: the data set, dealt to clients.
        share: in [0, 1); 0 leaves the data set as it is.
        seed: with it the rows are drawn.

    Raises:
        RequestError: no client has enough rows to spare one, or one has none left.
    """
    if not share:
        return dataset
    owners = dataset.owners
    owner = np.repeat(np.arange(len(owners)), owners.sizes)
    # Of a row that several clients own, one draw for all.
    _, first, same = np.unique(owners.rows, return_index=True, return_inverse=True)
    draw = keyed(Draw.VALIDATION, seed).random(len(owner))[first][same]
    place = np.empty(len(owner), dtype=np.int64)  # of a row in its client's random order
    place[np.lexsort((draw, owner))] = np.arange(len(owner)) - owners.offsets[owner]
    spared = place < np.floor(share * owners.sizes + _ROUNDING)[owner]
    kept = ~np.isin(owners.rows, owners.rows[spared])
    if kept.all():
        raise RequestError(f"validation: a share of {share} is less than one row of every client")
    sizes = np.bincount(owner[kept], minlength=len(owners))
    if not sizes.all():
        raise RequestError(
            f"validation: a share of {share} leaves client '{owners.ids[int(sizes.argmin())]}' no "
            "row: others own them too"
        )
    training = ClientRows(owners.ids, owners.rows[kept], np.cumsum([0, *sizes]))
    return dataset.with_clients(training, np.unique(owners.rows[~kept]))


def _draw_counts(
    rng: np.random.Generator, alpha: float, size: int, remaining: np.ndarray
) -> np.ndarray:
    """Draw how many examples of each label one client takes out of those remaining."""
    proportions = _proportions(rng, alpha, len(remaining))
    share = np.zeros_like(remaining)
    while (needed := size - share.sum()) > 0:
        left = remaining - share
        weights = np.where(left > 0, proportions, 0.0)
        if weights.sum() <= 0:  # every label that this client wanted is used up
            weights = left.astype(float)
        draw = rng.multinomial(needed, weights / weights.sum())
        share += np.minimum(draw, left)
    return share


def _proportions(rng: np.random.Generator, alpha: float, labels: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        proportions = rng.dirichlet(np.full(labels, min(alpha, 1e12)))
    if np.isfinite(proportions).all() and proportions.sum() > 0:
        return proportions
    return np.eye(labels)[rng.integers(labels)]  # alpha too small to compute with: its limit


def _equal_sizes(rows: int, clients: int) -> np.ndarray:
    return np.diff(np.linspace(0, rows, clients + 1).astype(np.int64))


def _columns(rows: np.ndarray, sizes: np.ndarray) -> ClientRows:
    width = len(str(len(sizes) - 1))
    ids = [f"{index:0{width}d}" for index in range(len(sizes))]
    return ClientRows(ids, rows, np.concatenate([[0], np.cumsum(sizes)]))
