"""Random numbers keyed by what they are for, so that no draw depends on another or on the order."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cache

import numpy as np
import torch

# torch asks the driver anew each time; `device` would take a GPU that a process may not need.
_has_gpu = cache(torch.cuda.is_available)


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


def seed_all(seed: int) -> None:
    """Seed what models and strategies draw from: torch's, NumPy's and Python's own generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_torch(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators.

    Not by torch.manual_seed: while no GPU is in use it writes down its caller's stack, 0.1 ms each
    time, and some milliseconds where that is not in the caches.
    """
    torch.default_generator.manual_seed(seed)
    if _has_gpu():
        torch.cuda.manual_seed_all(seed)


def seed_strategy(seed: int, server_round: int) -> None:
    """Seed what Flower's strategies, and a user's, draw from in a round."""
    seed_all(torch_seed(keyed(Draw.STRATEGY, seed, server_round)))


@contextmanager
def draws_undone() -> Iterator[None]:
    """Let what `seed_all` seeds be afterwards as it was; of GPUs, the one in use."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
