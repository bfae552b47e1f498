"""The test by betting: evidence against p <= p0 that may be looked at any time.

Voracek, "Treatment of Statistical Estimation Problems in Randomized Smoothing" (NeurIPS 2024), with
Ville's inequality; the bet here is the mixture of all q > p0.
"""

import math
from typing import Any

import numpy as np

from jaxcert.smoothing.confidence.binomial import EPSILON

HALVINGS = 60  # below the spacing of float64 for every bound above 2^-8
LARGEST = 1 / math.e  # alpha above it counts as this, see the end of the proof

# Let k_t be the successes of t draws of probability p, and pi the density of Beta(1/2, 1/2)
# restricted to q > p0. The wealth
#
#     W_t(p0) = integral_p0^1 (q/p0)^k_t ((1-q)/(1-p0))^(t-k_t) pi(q) dq
#
# starts at W_0 = 1. A draw multiplies each integrand, in expectation, by
# p q/p0 + (1-p)(1-q)/(1-p0), which is 1 for p = p0, grows with p because q > p0, and so is at most
# 1 for p <= p0: W is a nonnegative supermartingale, and by Ville's inequality
#
#     P[W_t(p0) >= 1/alpha for any t] <= alpha    for every p <= p0.
#
# W in closed form: with B the beta function, I the regularised incomplete one, and Pi = (2/pi)
# arcsin(sqrt(1-p0)) the mass of Beta(1/2, 1/2) above p0,
#
#     W_t(p0) = B(k+1/2, t-k+1/2) (1 - I_p0(k+1/2, t-k+1/2)) / (pi Pi p0^k (1-p0)^(t-k)).
#
# W grows with k, since every integrand does, so a boundary on the count says it all.
#
# It also falls with p0 where it exceeds e, so that what rejects p0 rejects all below. The
# derivative of log W in p0 is (pi(p0)/Pi) (1 - 1/W) - d / (p0 (1-p0)), where d = k - t p0 and
# pi(p0)/Pi = 1 / (2 sqrt(p0 (1-p0)) arcsin(sqrt(1-p0))) <= 1 / (2 sqrt(p0) (1-p0)): it is negative
# for d >= 1/2. And where d < 1/2, W is at most e: it is a mean of likelihood ratios, none of which
# exceeds 1 if d <= 0, and else exp(t KL(k/t || p0)) <= exp(d^2 / (t p0 (1-p0))), since KL is at
# most chi^2. For p0 <= 1/2, k >= 1 gives t p0 > 1/2, and the exponent is below (1/4) / (1/4); for
# p0 >= 1/2, k <= t gives t (1-p0) >= d, and it is at most d / p0 < 1.


def log_wealth(k: Any, t: Any, p0: Any, *, tail: bool = True) -> np.ndarray:
    """A lower bound on log W_t(p0) of k successes in t draws, for k > t p0.

    Args:
      k, t, p0: float64 arrays that broadcast, 0 < k <= t, 0 < p0 < 1.
      tail: False leaves 1 - I out, which is less than 1: cheaper, and not a lower bound.
    """
    from scipy.special import betaincc, betaln

    prior = np.log(2 * np.arcsin(np.sqrt(1 - p0)))
    evidence = betaln(k + 0.5, t - k + 0.5) - k * np.log(p0) - (t - k) * np.log1p(-p0) - prior
    if not tail:
        return evidence
    with np.errstate(divide="ignore"):
        evidence = evidence + np.log(betaincc(k + 0.5, t - k + 0.5, p0))
    # A sum of terms of size t log t at most. Against 50 digits, for t = 1 to 2^31 at up to 8
    # standard deviations above the mean where W > e, the error was at most 1.6 eps (100 + t log t),
    # so 16 are allowed for.
    return evidence - 16 * EPSILON * (100 + t * np.log1p(t))


def betting_lower(k: Any, t: Any, alpha: Any) -> np.ndarray:
    """A lower bound on p that holds at all times t at once, with probability 1 - alpha.

    The infimum of the p0 that the betting test has not rejected: Voracek (NeurIPS 2024), with the
    truncated mixture that is derived above. Wherever a run is interrupted, for whatever reason,
    what it has seen so far proves p >= betting_lower(k, t, alpha). On the host, in float64; never
    above the exact infimum.

    Args:
      k: ints (...), successes so far; anything outside [0, t] gives 0.
      t: ints (...), draws so far.
      alpha: one minus the confidence; above 1/e it counts as 1/e.

    Returns:
      float64 (...).

    Example:
      >>> print(betting_lower(990, 1000, 0.001).round(4))
      0.9712
    """
    k, t, alpha = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (k, t, alpha)))
    usable = (k > 0) & (k <= t) & (alpha > 0)
    k, t = np.where(usable, k, 1.0), np.where(usable, t, 1.0)
    needed = -np.log(np.where(usable, np.minimum(alpha, LARGEST), LARGEST))
    # Whatever the lower end is, its own wealth rejects it, and so all below.
    low, high = np.zeros(k.shape), k / t
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rejected = log_wealth(k, t, middle) >= needed
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.where(usable, low, 0.0)
