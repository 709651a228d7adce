"""Random numbers keyed by what they are for, so that no draw depends on another or on the order."""

import random
from enum import IntEnum

import numpy as np
import torch


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
    STRATEGY = 11


def keyed(draw: Draw, seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one draw, a function of the seed and the key (round, client)."""
    return np.random.default_rng([int(draw), seed, *key])


def torch_seed(rng: np.random.Generator) -> int:
    """Draw a seed for torch's own generator."""
    return int(rng.integers(1 << 63))


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, of the CPU and of every GPU.

    torch.manual_seed does so too, but writes down its caller's stack while no GPU is in use: 0.1 ms
    each time, and some milliseconds where that is not in the caches.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def seed_others(seed: int, server_round: int) -> None:
    """Seed the generators that Flower's strategies and a user's draw from, for a round."""
    rng = keyed(Draw.STRATEGY, seed, server_round)
    random.seed(torch_seed(rng))
    np.random.seed(torch_seed(rng) % 2**32)
    seed_torch(torch_seed(rng))
