"""Natural clients: which take part, with how many of their examples, and which are held out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedinit.errors import RequestError
from fedinit.randomness import Draw, keyed


@dataclass(frozen=True)
class Choice:
    """Which natural clients take part, by draws that are the same for every run.

    Args:
        max_clients: at most so many, drawn among those with enough examples.
        min_examples: clients with fewer are left out.
        max_examples_per_client: at most so many rows of each, drawn at random.
        seed: of the draws; not the run's, so that all its seeds see the same clients.
    """

    max_clients: int | None = None
    min_examples: int = 1
    max_examples_per_client: int | None = None
    seed: int = 0

    def clients(self, sizes: np.ndarray) -> np.ndarray:
        """Return the positions, ascending, of the chosen among clients of these sizes (n,).

        Raises:
            RequestError: a number is below 1, or no client has enough examples.
        """
        return np.sort(self._clients(sizes, keyed(Draw.CLIENTS, self.seed)))

    def rows(self, owners: np.ndarray) -> np.ndarray:
        """Return the chosen rows, ascending, of data with these owners (n,).

        Raises:
            RequestError: a number is below 1, or no client has enough examples.
        """
        _, owner, sizes = np.unique(owners, return_inverse=True, return_counts=True)
        rng = keyed(Draw.CLIENTS, self.seed)
        rows = np.flatnonzero(np.isin(owner, self._clients(sizes, rng)))
        if self.max_examples_per_client is None:
            return rows
        order = rows[np.lexsort((rng.random(len(rows)), owner[rows]))]
        ends = np.cumsum(np.bincount(owner[order], minlength=len(sizes)))
        starts = np.concatenate([[0], ends[:-1]])
        place = np.arange(len(order)) - starts[owner[order]]
        return np.sort(order[place < self.max_examples_per_client])

    def _clients(self, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        check_counts(
            {name: value for name, value in vars(self).items() if value is not None}, "seed"
        )
        clients = np.flatnonzero(sizes >= self.min_examples)
        if not len(clients):
            raise RequestError(
                f"dataset_args.min_examples: no client has {self.min_examples} examples; "
                f"the largest has {sizes.max(initial=0)}"
            )
        if self.max_clients is None or self.max_clients >= len(clients):
            return clients
        return rng.permutation(clients)[: self.max_clients]


def held_out_clients(owners: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which rows (n,) belong to the share of clients, at least one, that is held out.

    Raises:
        RequestError: the share is not in (0, 1), or no client would be left.
    """
    names, owner = np.unique(owners, return_inverse=True)
    if not isinstance(share, float) or not 0 < share < 1:
        raise RequestError(f"dataset_args.test_share: expected a number in (0, 1), got {share!r}")
    count = max(1, round(share * len(names)))
    if count >= len(names):
        raise RequestError(
            f"dataset_args.test_share: {share} of {len(names)} clients leaves none to train on"
        )
    held = keyed(Draw.CLIENTS, seed, 1).permutation(len(names))[:count]
    return np.isin(owner, held)


def check_counts(counts: Mapping[str, object], *exempt: str) -> None:
    """Check whole numbers from 1 among a data set's arguments.

    Raises:
        RequestError: one is something else.
    """
    for name, value in counts.items():
        if name not in exempt and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise RequestError(
                f"dataset_args.{name}: expected a whole number from 1, got {value!r}"
            )
