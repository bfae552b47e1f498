"""Tables of integers that say, look by look, which counts of votes decide whether p > p0."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxcert.pytrees import pytree
from jaxcert.smoothing.confidence.betting import LARGEST, log_wealth
from jaxcert.smoothing.confidence.binomial import EPSILON, SMALLEST

NEVER = 2**31 - 1  # more than any count
ROUNDING = 2.0**-40  # of sums and products of shares, many times over


class Spending(NamedTuple):
    """How a test spends its alpha, or its beta: shares that add up to 1 at most.

    Attributes:
      anytime: the share of the betting test, which may look at every row.
      looks: float64 (T,), the shares of Clopper-Pearson bounds at the rows, 0 for no look.
      curtailed: whether a look that cannot come out otherwise any more is decided at once.
    """

    anytime: float
    looks: np.ndarray
    curtailed: bool = True


@pytree
@dataclasses.dataclass(frozen=True)
class Boundaries:
    """When to stop: certified where the count is at least `certify`, hopeless up to `give_up`.

    Row t is for the count k of votes after t + 1 blocks of draws, column r for the question whether
    p > p0[r]. `k >= certify[t, r]` proves it; `k <= give_up[t, r]` ends the attempt, so that k is
    never both. The first of the two to happen decides for good, and at the last row one does.

    For any one p, the probability over the whole run that any p0[r] >= p is certified is at most
    alpha: for all columns together.

    Attributes:
      certify: int32 (T, R), `NEVER` where no count is enough.
      give_up: int32 (T, R), -1 where no count is too small.
    """

    certify: np.ndarray
    give_up: np.ndarray


# Soundness, for one p0 and p <= p0. Let a_t be the shares of alpha that the looks t and, as a_0,
# betting are given. A Clopper-Pearson look certifies p > p0 at k_t if P[Bin(n_t, p0) >= k_t] <=
# a_t, which happens with probability at most a_t, first for p = p0 and then for p < p0, where large
# counts are rarer; betting certifies with probability at most a_0. By the union bound any of them
# does with probability at most sum a_t <= alpha, however the looks depend on each other and on when
# the run stops. Stopping without a certificate, on whatever grounds, only takes certificates away.
#
# Soundness for all columns at once. Both conditions get harder as p0 grows (P[Bin(n, p0) >= k]
# grows with p0, W falls, see betting.py), so certify[t, r] does not fall in p0; rounding is undone
# by a running maximum over p0, which only raises boundaries. Let p0* be the least p0[r] >= p.
# Certifying any p0[r] >= p takes a count k_t >= certify[t, r] >= certify[t, r*], and such a count
# ever comes up with probability alpha at most: one path, one test, no union over columns.
#
# Give-up boundaries are nested likewise, so that at each look the columns certified are the
# smallest p0 and those given up the largest; and so they stay: a column that is given up first
# takes all larger undecided ones along, one that is certified first all smaller undecided ones.
#
# Curtailing changes no decision. The count never falls and grows by n_s - n_t at most from row t to
# s. So k_t >= certify[s] for some s > t ends in k_s >= certify[s] whatever comes, and certify[t]
# may be lowered to min_{s >= t} certify[s]: some k_t reaches these exactly if some k_s reaches its
# own. And k_t < certify[s] - (n_s - n_t) for all s >= t can never certify. At the last row, s = t,
# that gives up every count that is not certified.
def plan(
    p0: np.ndarray, draws: np.ndarray, alpha: tuple[float, Spending], beta: tuple[float, Spending]
) -> Boundaries:
    """The tables of a test that spends alpha and beta like this.

    Args:
      p0: float64 (R,) in (0, 1].
      draws: int64 (T,), n_1 < ... < n_T: how many draws each row has seen.
      alpha: how much to spend on certifying, and how.
      beta: how much on giving up. It bounds the probability of giving p0 <= p up before the last
        row, and touches no proof.
    """
    order = np.argsort(p0, kind="stable")
    rank = np.argsort(order, kind="stable")
    seen, ascending = draws[:, None], p0[order]

    certify = np.maximum.accumulate(_least_counts(draws, ascending, *alpha), axis=1)
    # Failures have probability 1 - p: giving up means to prove 1 - p > 1 - p0 from them.
    give_up = seen - _least_counts(draws, 1 - ascending, *beta)
    give_up = np.maximum.accumulate(np.maximum(give_up, -1), axis=1)
    give_up[-1] = seen[-1]
    if alpha[1].curtailed:
        certify = _least_from_here(certify)
        give_up = np.maximum(give_up, _least_from_here(certify - seen) + seen - 1)
    give_up = np.minimum(np.minimum(give_up, certify - 1), seen)
    return Boundaries(certify[:, rank].astype(np.int32), give_up[:, rank].astype(np.int32))


def _least_from_here(table: np.ndarray) -> np.ndarray:
    return np.minimum.accumulate(table[::-1])[::-1]


def _least_counts(
    draws: np.ndarray, p0: np.ndarray, level: float, spending: Spending
) -> np.ndarray:
    """int64 (T, R): the least counts that prove p > p0 at this level; `NEVER` where none does."""
    table = np.full((len(draws), len(p0)), NEVER, np.int64)
    provable = (p0 > 0) & (p0 < 1)
    n, p, level = draws[:, None], p0[provable], level * (1 - ROUNDING)
    if spending.anytime > 0:
        table[:, provable] = betting_count(n, p, level * spending.anytime)
    rows = spending.looks > 0
    shares = level * spending.looks[rows, None]
    exact = clopper_pearson_count(n[rows], p, shares)
    table[np.ix_(rows, provable)] = np.minimum(table[np.ix_(rows, provable)], exact)
    return table


def clopper_pearson_count(n: Any, p0: Any, alpha: Any) -> np.ndarray:
    """The least k whose Clopper-Pearson bound at alpha, of n draws, is p0 or more.

    Args:
      n: ints; p0: in (0, 1); alpha: all broadcast.

    Returns:
      int64, never below the exact one, `NEVER` where no count proves it.
    """
    from scipy.special import betainc

    # P[Bin(n, p0) >= k] = I_p0(k, n - k + 1). SciPy's relative error was at most 0.1 eps (100 +
    # n log n), against 50 digits for n = 1 to 2^31 at up to 8 standard deviations above the mean.
    n, p0, alpha = np.broadcast_arrays(n, p0, alpha)
    slack = 16 * EPSILON * (100 + n * np.log1p(n))

    def proved(k: np.ndarray) -> np.ndarray:
        return np.maximum(betainc(k, n - k + 1.0, p0) * (1 + slack), SMALLEST) <= alpha

    count = _least(proved, np.zeros(n.shape, np.int64), n)
    return np.where(count <= n, count, NEVER)


def betting_count(n: Any, p0: Any, alpha: float) -> np.ndarray:
    """The least k with W_n(p0) >= 1 / alpha: see `betting`.

    Args:
      n: ints; p0: in (0, 1), broadcast with n.
      alpha: above 1/e it counts as 1/e.

    Returns:
      int64, never below the exact one, `NEVER` where no count proves it.
    """
    n, p0 = np.broadcast_arrays(n, p0)
    needed = -math.log(min(alpha, LARGEST))

    # W without its tail is larger, grows with k above n p0, and takes a tenth of the time.
    count = _least(
        lambda k: log_wealth(k, n, p0, tail=False) >= needed, np.floor(n * p0).astype(np.int64), n
    )
    # What is left are a few steps.
    short = np.flatnonzero(count <= n)
    flat, n, p0 = count.reshape(-1), n.reshape(-1), p0.reshape(-1)
    while short.size:
        proved = log_wealth(flat[short], n[short], p0[short]) >= needed
        short = short[~proved]
        flat[short] += 1
        short = short[flat[short] <= n[short]]
    return np.where(flat <= n, flat, NEVER).reshape(count.shape)


def _least(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The least k in (low, n] for which an increasing statement holds; n + 1 where none."""
    high = n + 1
    while np.any(high - low > 1):
        middle = (low + high) // 2
        # Where the ends have met, middle is low, at which nothing is asked.
        found = (middle > low) & holds(np.clip(middle, 1, n))
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return high
