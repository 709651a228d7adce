"""Ctrl-C and SIGTERM: once, the round under way is finished and kept; twice, all stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(KeyboardInterrupt):
    """The round was finished and kept, and nothing more is to be done."""


class Stop:
    """Whether to stop after the round.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._in_round = False
        self._stopping = False  # whatever comes now, Ray is being shut down, which takes its time

    @contextmanager
    def caught(self, in_round: bool = False) -> Iterator[None]:
        """Catch the signals.

        Args:
            in_round: whether there is a round to finish; otherwise the first signal stops at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return
        outer, self._in_round = self._in_round, in_round
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            self._stopping |= in_round and self.requested
            self._in_round = outer
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, _number: int, _frame: Any) -> None:
        if self._stopping:
            return
        again, self.requested = self.requested, True  # Python may lose what is raised here
        if self._in_round and not again:
            # Not print: the signal may come while it is printing.
            os.write(2, b"\nstopping after this round; once more to stop at once\n")
            return
        self._stopping = True
        raise KeyboardInterrupt if self._in_round else StoppedError
