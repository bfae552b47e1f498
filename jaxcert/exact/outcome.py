"""What is known about the sets of one call, and what the call may still spend."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from jaxcert.certificate import Reason, Status


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to give up.

    Attributes:
      seconds: of wall-clock time.
      domains: that are bounded, or None for any number.
      memory: bytes of sub-domains, on the device and on the host together.
    """

    seconds: float = 60.0
    domains: int | None = None
    memory: int = 2**31


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a search is: seconds since it began, sub-domains bounded so far and waiting now, and
    questions without an answer."""

    seconds: float
    visited: int
    waiting: int
    unanswered: int


Report: TypeAlias = Callable[[Progress], None]


@dataclasses.dataclass
class Outcome:
    """What is known so far, in numpy.

    Attributes:
      status, reason: (n,) as in a `Verdict`.
      example: counterexamples (n, *input) in float64.
      visited: sub-domains that were bounded.
      spent: seconds on attacks, ranges of hidden values, the search's steps and leaves, including
        what was compiled for them.
    """

    status: np.ndarray
    reason: np.ndarray
    example: np.ndarray
    visited: int = 0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the seconds of a stretch at whose end all results are there."""
        began = time.perf_counter()
        yield
        self.spent[on] = self.spent.get(on, 0.0) + time.perf_counter() - began

    @property
    def open(self) -> np.ndarray:
        """Which questions have no answer."""
        return self.status == Status.UNKNOWN

    def falsify(self, broken: Any, example: Any) -> None:
        """Enter counterexamples, bool (n,) and (n, *input) or one (1, *input)."""
        new = np.asarray(broken) & self.open
        self.example[new] = np.broadcast_to(example, self.example.shape)[new]
        self.status[new], self.reason[new] = Status.FALSIFIED, Reason.NONE

    def settle(self, which: Any, status: Status, reason: Reason = Reason.NONE) -> None:
        """Enter the status of those among `which` that are open."""
        new = np.asarray(which) & self.open
        self.status[new], self.reason[new] = status, reason


class Clock:
    """The time and the work of one call, against its budget."""

    def __init__(self, budget: Budget, report: Report | None):
        self.start, self.budget, self._report = time.perf_counter(), budget, report

    @property
    def seconds(self) -> float:
        """Since the call began."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds, negative when time is up."""
        return self.budget.seconds - self.seconds

    def over(self, outcome: Outcome) -> Reason | None:
        """What is used up."""
        if self.left < 0:
            return Reason.TIME
        if self.budget.domains is not None and outcome.visited >= self.budget.domains:
            return Reason.DOMAINS
        return None

    def report(self, outcome: Outcome, waiting: int) -> None:
        """Tell whoever wants to know."""
        if self._report is not None:
            unanswered = int(outcome.open.sum())
            self._report(Progress(self.seconds, outcome.visited, waiting, unanswered))


class Stuck:
    """Which of n sets have leaves that are not settled, by their questions, and why; of several
    reasons one counts."""

    REASONS = Reason.NUMERICS, Reason.LOOSE, Reason.TIME  # in order: the last one of those noted

    def __init__(self, n: int):
        self._rank = np.full(n, -1)
        self.questions: set[int] = set()

    def note(self, place: int, question: int, reason: Reason) -> None:
        """A leaf of a question about a set was left for a reason."""
        self.questions.add(question)
        self._rank[place] = max(self._rank[place], self.REASONS.index(reason))

    def by(self, reason: Reason) -> np.ndarray:
        """The sets that are stuck for this reason."""
        return self._rank == self.REASONS.index(reason)

    @property
    def any(self) -> np.ndarray:
        """The sets that are stuck."""
        return self._rank >= 0
