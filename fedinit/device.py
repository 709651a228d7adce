"""The device that a process computes on: its GPU if it was given one, else the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_WORTH_THREADS = 1 << 20  # elements: one thread is through fewer before another has woken


@cache
def device() -> torch.device:
    """Return this process's device; Ray shows a worker its own GPU as the only one.

    On the CPU the same seed and number of workers give the same bits. On a GPU they give the same
    cohorts, shuffles and dropout, and weights up to rounding: its kernels add up in any order, and
    the fastest are chosen as they come. TF32, with its 10 bits, is off: a run means float32, and
    clients trained as one agree with clients trained one by one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # of matrix products it is off by default
    return torch.device("cuda", torch.cuda.current_device())


def synchronize() -> None:
    """Wait for the device to have done what it was given: before a clock is read."""
    if device().type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products of float32 matrices have float32's digits, whatever a user's module has set."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Let torch use one thread, in this process, while it works on short vectors.

    Args:
        elements: of a vector.
    """
    before = torch.get_num_threads()
    try:
        if elements < _WORTH_THREADS:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def free_bytes() -> int:
    """Return the GPU's memory that is free."""
    return torch.cuda.mem_get_info()[0]
