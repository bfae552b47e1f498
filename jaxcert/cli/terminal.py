"""What people see of a run while it lasts: one line on a terminal, nothing anywhere else."""

import math
import sys
import time

from jaxcert.exact.outcome import Progress

_CLEAR = "\r\x1b[K"


class Ticker:
    """A line on stderr that is written over now and then, if stderr is a terminal.

    Attributes:
      title: what the line begins with.
      visited: sub-domains bounded, as last reported.
    """

    def __init__(self, quiet: bool):
        self.title, self.visited = "", 0
        self._on = not quiet and sys.stderr.isatty()
        self._shown_at = -math.inf

    def begin(self, title: str) -> None:
        """Start a line."""
        self.title, self.visited = title, 0
        self._show("reading and compiling")

    def __call__(self, progress: Progress) -> None:
        """Take a search's report."""
        self.visited = progress.visited
        if time.monotonic() - self._shown_at > 0.2:
            self._shown_at = time.monotonic()
            self._show(
                f"{progress.seconds:.0f} s of searching, {progress.visited:,} sub-domains "
                f"bounded, {progress.waiting:,} waiting"
            )

    def clear(self) -> None:
        """Take the line away."""
        if self._on:
            print(_CLEAR, end="", file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        if self._on:
            print(f"{_CLEAR}{self.title}{text}", end="", file=sys.stderr, flush=True)
