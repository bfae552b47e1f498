"""Tests of p > p0 that look at the votes while they come in, and stop when the answer is clear."""

import abc
import dataclasses
import math
from typing import Any

import numpy as np

from jaxcert.smoothing.confidence.boundaries import NEVER, ROUNDING, Boundaries, Spending, plan


class SequentialTest(abc.ABC):
    """How to spend alpha over the looks at one growing count: what every test has in common.

    Implementations are frozen and hashable, so that jit takes them as static arguments.
    """

    @abc.abstractmethod
    def spending(self, draws: np.ndarray) -> Spending:
        """The shares of alpha: of betting, and of a look after each of `draws` (T,), increasing."""

    def boundaries(
        self, p0: Any, *, n_max: int, alpha: float, peek: int = 100, beta: float = 1e-3
    ) -> Boundaries:
        """The counts that prove p > p0, and those at which to give up, for every row of the run.

        A run that follows them certifies any p0[r] >= p with probability alpha at most, for all r
        together. On the host; the tables are ints, that a jitted loop compares exactly.

        Args:
          p0: float64 (R,) in (0, 1], the probabilities to exceed, in any order. They are taken as
            they are: round Phi(r / sigma) up. None can be shown to exceed 1.
          n_max: where the run ends, a multiple of `peek` below 2^31 - 1.
          alpha: the probability with which a certificate may be wrong.
          peek: draws from one row to the next.
          beta: the probability with which a p > p0 may be given up before n_max. It costs power
            only: no certificate depends on it.

        Returns:
          `Boundaries` with n_max / peek rows.

        Raises:
          ValueError: for numbers no run can have.

        Example:
          >>> tables = Hybrid().boundaries([0.6, 0.9], n_max=1000, alpha=0.001)
          >>> print(tables.certify[-1], tables.give_up[-1])  # Clopper-Pearson, and nothing between
          [650 930] [649 929]
          >>> print(tables.certify[0], tables.give_up[0])  # after the first 100 draws
          [ 82 100] [39 75]
        """
        p0 = _checked(p0, n_max, peek, alpha=alpha, beta=beta)
        draws = np.arange(peek, n_max + 1, peek)
        spending = self.spending(draws)
        total = spending.anytime + math.fsum(spending.looks)
        if not (
            total <= 1 + ROUNDING / 2 and spending.anytime >= 0 and np.all(spending.looks >= 0)
        ):
            raise ValueError(
                f"{self} spends {total:.6g} times alpha: its shares must be at least 0 and add up "
                "to 1 at most"
            )
        return plan(p0, draws, (alpha, spending), (beta, _before_the_last(spending)))


def _before_the_last(spending: Spending) -> Spending:
    """How to spend beta: at the last row everything is decided, so the others take its share."""
    looks = spending.looks.copy()
    looks[-1] = 0.0
    total = spending.anytime + math.fsum(looks)
    if total == 0:
        return Spending(0.0, looks)
    return Spending(spending.anytime / total, looks / total)


@dataclasses.dataclass(frozen=True)
class FixedSize(SequentialTest):
    """One Clopper-Pearson look after n_max draws: CERTIFY of Cohen et al. (ICML 2019).

    Attributes:
      curtailed: stop where the draws that are left can change nothing. Same answers, fewer draws.
    """

    curtailed: bool = False

    def spending(self, draws: np.ndarray) -> Spending:
        """All of it at the end."""
        return Spending(0.0, _at(draws, draws[-1:]), self.curtailed)


@dataclasses.dataclass(frozen=True)
class StagedClopperPearson(SequentialTest):
    """Clopper-Pearson looks at a few stages, which share alpha equally (Bonferroni).

    Horvath, Mueller, Fischer and Vechev, "Boosting Randomized Smoothing with Variance Reduced
    Classifiers" (ICLR 2022), Section 5. Each stage here looks at all draws so far, not at fresh
    ones alone.

    Attributes:
      looks: draws after which to look, besides n_max. Those of n_max or more fall away, others are
        rounded up to whole blocks.
    """

    looks: tuple[int, ...] = (1_000, 10_000)

    def __post_init__(self):
        valid = isinstance(self.looks, tuple) and all(isinstance(n, int) for n in self.looks)
        if not (valid and all(n > 0 for n in self.looks)):
            raise ValueError(
                f"looks must be a tuple of positive ints, got {self.looks}; e.g. (1_000, 10_000)"
            )

    def spending(self, draws: np.ndarray) -> Spending:
        """An equal share at every stage."""
        early = draws[np.searchsorted(draws, [look for look in self.looks if look < draws[-1]])]
        stages = np.union1d(early, draws[-1:])
        return Spending(0.0, _at(draws, stages) / len(stages))


@dataclasses.dataclass(frozen=True)
class UnionBound(SequentialTest):
    """Clopper-Pearson looks at geometric times, the j-th at 5 alpha / ((j + 4) (j + 5)).

    Voracek, "Treatment of Statistical Estimation Problems in Randomized Smoothing" (NeurIPS 2024).
    The shares add up to 1 over all j >= 1; the look at n_max also gets those of all later times.

    Attributes:
      ratio: of one time to the next, in whole blocks.
    """

    ratio: float = 1.1

    def __post_init__(self):
        if not 1 < self.ratio < math.inf:
            raise ValueError(f"ratio must exceed 1, got {self.ratio}; type UnionBound(ratio=1.1)")

    def spending(self, draws: np.ndarray) -> Spending:
        """The j-th share at the j-th time, and at n_max all that is left."""
        times = [0]
        while times[-1] < len(draws) - 1:
            draw = self.ratio * float(draws[times[-1]])
            row = int(np.searchsorted(draws, min(draw, draws[-1])))
            times.append(max(row, times[-1] + 1))
        j = np.arange(1, len(times) + 1)
        shares = np.zeros(len(draws))
        shares[times] = 5 / ((j + 4) * (j + 5))
        # The shares of all times that do not come any more: sum_{j > J} = 5 / (J + 5).
        shares[-1] += 5 / (len(times) + 5)
        return Spending(0.0, shares)


@dataclasses.dataclass(frozen=True)
class Betting(SequentialTest):
    """The betting test alone, at every look: Voracek (NeurIPS 2024), by Ville's inequality."""

    def spending(self, draws: np.ndarray) -> Spending:
        """All of it on betting."""
        return Spending(1.0, np.zeros(len(draws)))


@dataclasses.dataclass(frozen=True)
class Hybrid(SequentialTest):
    """Betting at every look, and a Clopper-Pearson look at n_max: the default.

    What is clear is decided early by betting, and what is close is decided at n_max almost as well
    as by all of alpha there. Whenever it is interrupted, `betting_lower(k, t, betting * alpha)`
    still holds, together with whatever it has certified.

    Attributes:
      betting: the share of alpha spent on betting.
    """

    betting: float = 0.2

    def __post_init__(self):
        if not 0 <= self.betting <= 1:
            raise ValueError(
                f"betting must be a share of alpha in [0, 1], got {self.betting}; type Hybrid(0.2)"
            )

    def spending(self, draws: np.ndarray) -> Spending:
        """A share on betting, the rest at the end."""
        return Spending(self.betting, (1 - self.betting) * _at(draws, draws[-1:]))


def _at(draws: np.ndarray, looks: np.ndarray) -> np.ndarray:
    return np.isin(draws, looks).astype(np.float64)


def _checked(p0: Any, n_max: int, peek: int, **levels: float) -> np.ndarray:
    p0 = np.asarray(p0, np.float64)
    if p0.ndim != 1 or not np.all((p0 > 0) & (p0 <= 1)):
        raise ValueError(
            f"p0 must be probabilities (R,) in (0, 1], got {p0}; for radii r of Gaussian noise "
            "they are Phi(r / sigma)"
        )
    for name, value in {"n_max": n_max, "peek": peek}.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < NEVER:
            raise ValueError(
                f"{name} must be an int in [1, 2^31 - 2], got {value!r}; "
                "type n_max=100_000, peek=100"
            )
    if n_max % peek:
        raise ValueError(
            f"n_max={n_max} is no multiple of peek={peek}; take n_max={-(-n_max // peek) * peek}"
        )
    for name, value in levels.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {value}; type {name}=1e-3")
    return p0
