"""A limit of time that holds even while XLA compiles, which nothing can interrupt."""

import os
import threading
import time
from collections.abc import Callable

GRACE = 1.0
"""Seconds after its limit that a search may still take to come to its end."""


class Watchdog:
    """Ends the process at a time, unless the `with` block is left before.

    Args:
      at: a time of `time.perf_counter()`.
      last: called just before the end; it returns the exit status.
    """

    def __init__(self, at: float, last: Callable[[], int]):
        self._last, self._turn = last, threading.Lock()
        self._timer = threading.Timer(max(0.0, at - time.perf_counter()), self._end)
        self._timer.daemon = True

    def __enter__(self) -> "Watchdog":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._turn.acquire(blocking=False):
            threading.Event().wait()  # too late: the other thread is ending the process
        self._timer.cancel()

    def _end(self) -> None:
        if self._turn.acquire(blocking=False):
            status = 1
            try:
                status = self._last()
            finally:
                os._exit(status)
