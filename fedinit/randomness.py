"""Random numbers keyed by what they are for, so that no draw depends on another or on the order."""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a random draw decides; each has a stream of its own."""

    PARTITION = 1
    COHORT = 2
    STRAGGLERS = 3
    LOCAL_TRAINING = 4  # dropout and shuffles
    WEIGHTS = 5
    VALIDATION = 6
    SAMPLE = 7
    SEARCH = 8
    CLIENTS = 9
    PROXY = 10


def keyed(draw: Draw, seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one draw, a function of the seed and the key (round, client)."""
    return np.random.default_rng([int(draw), seed, *key])


def torch_seed(rng: np.random.Generator) -> int:
    """Draw a seed for torch's own generator."""
    return int(rng.integers(1 << 63))
