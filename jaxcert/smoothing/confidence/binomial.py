"""Confidence bounds on the probability of a class from its votes: exact binomial, in float64.

Everything here runs inside jit, vmap and scan, and returns float64 whatever the caller's default:
`numpy.asarray` reads it exactly, JAX operations outside `jax.enable_x64(True)` truncate it.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

Array: TypeAlias = jax.Array

HALVINGS = 100  # bisection ends at neighbouring float64 for every bound above 1e-14
TERMS = 1000
EPSILON = 2.0**-52
SMALLEST = 1e-300  # smaller tails may underflow to 0, which would not be an upper bound


def upper_tail(k: Any, n: Any, p: Any) -> Array:
    """An upper bound on P[Binomial(n, p) >= k] for p below k / n; 1 where no better one is sure.

    Args:
      k, n, p: numbers or arrays that broadcast; 0 < k <= n < 2^31. Anything else gives 1 or NaN,
        from which nothing can be concluded.

    Returns:
      float64, too large by a relative 1e-7 at most for n <= 10^6, and 1 within a small part of a
      standard deviation of the mean for n > 10^6. Only meaningful inside `jax.enable_x64(True)`.
    """
    # P[Binomial(n, p) >= k] = I_p(k, n - k + 1), the regularised incomplete beta function (DLMF
    # 8.17.5), which is (n choose k) p^k (1 - p)^(n - k + 1) over the fraction of `_fraction`.
    # `jax.lax.betainc` cannot be used: it is expanded when a function is lowered, outside of this
    # block, and then mixes float32 constants in.
    with jax.enable_x64(True):
        k, n, p = (jnp.asarray(value, jnp.float64) for value in (k, n, p))
        choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        front = jnp.exp(choose + k * jnp.log(p) + (n - k + 1) * jnp.log1p(-p))
        fraction, settled = _fraction(k, n - k + 1, p)
        # The exponent is a difference of terms of size n log n. Measured against SciPy for n = 2 to
        # 2^31 at 0 to 7 standard deviations below the mean, the relative error of the tail was at
        # most 6.5 eps (100 + n log n), so 16 are allowed for.
        slack = 16 * EPSILON * (100 + n * jnp.log(n))
        usable = settled & (k > 0) & (k <= n) & (p < k / n)
        tail = jnp.maximum(front / fraction * (1 + slack), SMALLEST)
        return jnp.where(usable, tail, 1.0)


def _fraction(a: Array, b: Array, x: Array) -> tuple[Array, Array]:
    """1 + d_1 / (1 + d_2 / (1 + ...)) of DLMF 8.17.22 for x < a / (a + b), and if it has settled.

    Evaluated from the front by the modified Lentz method (Thompson and Barnett 1986): the ratios
    c and 1 / d of successive numerators and denominators are kept, and c d multiplies the value.
    """
    one = jnp.ones(jnp.broadcast_shapes(a.shape, b.shape, x.shape), jnp.float64)

    def term(j: Array) -> Array:
        m = (j // 2).astype(jnp.float64)
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        return jnp.where(j % 2 == 0, even, odd)

    def step(state):
        j, value, c, d, _ = state
        d = 1 / _nonzero(1 + term(j) * d)
        c = _nonzero(1 + term(j) / c)
        return j + 1, value * c * d, c, d, jnp.abs(c * d - 1)

    def unsettled(state):
        return (state[0] <= TERMS) & jnp.any(state[-1] > 2 * EPSILON)

    start = (jnp.asarray(1, jnp.int32), one, one, 0 * one, one)
    _, value, _, _, change = jax.lax.while_loop(unsettled, step, start)
    return value, change <= 2 * EPSILON


def _nonzero(value: Array) -> Array:
    return jnp.where(value == 0, 1e-300, value)


def clopper_pearson_lower(successes: Any, n: Any, alpha: Any) -> Array:
    """A lower bound on p that holds with probability 1 - alpha over successes ~ Binomial(n, p).

    The exact one-sided bound of Clopper and Pearson (Biometrika 1934): the alpha-quantile of
    Beta(k, n - k + 1), so 0 at k = 0 and alpha^(1/n) at k = n. What is returned is never above it.
    For n <= 10^6 and alpha <= 0.3 it is below by a relative 1e-10 at most where k > n / 2, and by
    1e-7 for a handful of successes. It never exceeds k / n, which costs something for alpha > 1/2.

    Args:
      successes: ints (...), k; anything outside [0, n] gives 0.
      n: number of trials, below 2^31.
      alpha: one minus the confidence; below 1e-300 and from 1 on the bound is 0.

    Returns:
      float64 (...).
    """
    # Converted here: an argument of a jitted function would become float32 first.
    with jax.enable_x64(True):
        return _lower_bound(*(jnp.asarray(value, jnp.float64) for value in (successes, n, alpha)))


# The tail P[Bin(n, p) >= k] grows with p from 0 to 1, and the bound is where it equals alpha.
# Bisection keeps the tail at most alpha at the lower end, and the lower end is what is returned.
@jax.jit
def _lower_bound(k: Array, n: Array, alpha: Array) -> Array:
    with jax.enable_x64(True):

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            safe = upper_tail(k, n, middle) <= alpha
            return jnp.where(safe, middle, low), jnp.where(safe, high, middle)

        zero = jnp.zeros(jnp.broadcast_shapes(k.shape, n.shape, alpha.shape), jnp.float64)
        low, _ = jax.lax.fori_loop(0, HALVINGS, halve, (zero, zero + 1))
        return jnp.where(alpha < 1, low, 0.0)


def clopper_pearson_upper(successes: Any, n: Any, alpha: Any) -> Array:
    """An upper bound on p that holds with probability 1 - alpha over successes ~ Binomial(n, p).

    The exact one-sided bound of Clopper and Pearson (Biometrika 1934): the (1 - alpha)-quantile of
    Beta(k + 1, n - k), so 1 - alpha^(1/n) at k = 0 and 1 at k = n. What is returned is never below
    it.

    Args:
      successes: ints (...), k; anything outside [0, n] gives 1.
      n: number of trials, below 2^31.
      alpha: one minus the confidence; below 1e-300 and from 1 on the bound is 1.

    Returns:
      float64 (...).

    Example:
      >>> import numpy as np
      >>> print(np.asarray(clopper_pearson_upper(0, 100, 0.001)).round(4))  # 1 - 0.001^(1/100)
      0.0667
    """
    # The failures are Binomial(n, 1 - p), so that U(k) = 1 - L(n - k).
    with jax.enable_x64(True):
        failures = jnp.asarray(n, jnp.float64) - jnp.asarray(successes, jnp.float64)
        lower = clopper_pearson_lower(failures, n, alpha)
        # The difference is rounded to a neighbour of the exact one at most, and nextafter passes
        # that; 1 is never too low.
        return jnp.where(lower > 0, jnp.minimum(jnp.nextafter(1 - lower, jnp.inf), 1.0), 1.0)


def clopper_pearson(successes: Any, n: Any, alpha: Any) -> tuple[Array, Array]:
    """An interval that holds p with probability 1 - alpha over successes ~ Binomial(n, p).

    Both one-sided bounds of Clopper and Pearson (Biometrika 1934), at alpha / 2 each.

    Args:
      successes, n, alpha: as for `clopper_pearson_lower`.

    Returns:
      (lower, upper), each float64 (...).

    Example:
      >>> import numpy as np
      >>> print(np.asarray(clopper_pearson(5, 10, 0.05)).round(4))
      [0.1871 0.8129]
    """
    with jax.enable_x64(True):
        half = jnp.asarray(alpha, jnp.float64) / 2
        return (
            clopper_pearson_lower(successes, n, half),
            clopper_pearson_upper(successes, n, half),
        )


def leader_is_certain(first: Any, second: Any, alpha: Any) -> Array:
    """Whether the class with `first` votes is the likelier of two, at confidence 1 - alpha.

    The two-sided binomial test of (n1, n1 + n2, 1/2) of Hung and Fithian (Annals of Statistics
    2019): the most voted of any number of classes is the likeliest one when the test rejects.

    Args:
      first, second: ints (...), the votes of the two leading classes, first >= second.
      alpha: the probability with which the answer may be wrong.

    Returns:
      bool (...).
    """
    with jax.enable_x64(True):
        first, second = jnp.asarray(first, jnp.float64), jnp.asarray(second, jnp.float64)
        # At p = 1/2 the distribution is symmetric: the p-value is twice the upper tail.
        p_value = 2 * upper_tail(first, first + second, 0.5)
        return (p_value <= alpha) & (first > second)
