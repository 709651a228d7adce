"""A lock between processes that ends with the process that holds it, however that ends."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there and stays.

    Args:
        path: the file; its content does not matter.
        taken: called if another process holds the lock; when it returns, that one is waited for.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
