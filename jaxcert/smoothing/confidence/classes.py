"""Bounds on the selected class and on all others from the same votes."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.smoothing.confidence.binomial import clopper_pearson_lower, clopper_pearson_upper

Array: TypeAlias = jax.Array


# Let A be the selected class, B = argmax_{c != A} p_c the likeliest of the others, and U increasing
# in the number of votes. A is given before the votes are drawn, and so B, unknown as it is, is one
# class, the same for all outcomes of the votes. Because max_{c != A} n_c >= n_B,
#
#     P[max_{c != A} p_c > U(max_{c != A} n_c; alpha/2)] <= P[p_B > U(n_B; alpha/2)] <= alpha/2,
#
# so that no union over the k - 1 other classes is needed: it is paid for by the maximum over the
# votes. It would be needed by a bound from the votes of a class that other draws have named, say
# the second in the selection, which need not be B: its votes bound nobody else's probability.
# The bound on p_A fails with probability alpha/2 at most, which makes alpha. That all other classes
# together have 1 - p_A at most adds nothing: n_c <= n - n_A, and U(n - n_A) = 1 - L(n_A).
def class_bounds(counts: Any, top: Any, n: Any, alpha: Any) -> tuple[Array, Array]:
    """p_A >= p_lower and p_c <= p_upper for every other class c, all with probability 1 - alpha.

    The pair that two-sided radii such as sigma/2 (Phi^-1(p_lower) - Phi^-1(p_upper)) of Cohen,
    Rosenfeld and Kolter (ICML 2019, Theorem 1) take, from Clopper-Pearson bounds at alpha / 2.

    Args:
      counts: ints (..., k), the votes for each class in n draws; those that abstained are missing.
      top: ints (...), the selected class A. It must not depend on `counts`: select it by other
        draws. A number that is no class gives p_lower = 0.
      n: number of draws, abstentions included, below 2^31.
      alpha: the probability with which a bound may be wrong.

    Returns:
      (p_lower, p_upper), each float64 (...).

    Raises:
      ValueError: fewer than two classes.

    Example:
      >>> p_lower, p_upper = class_bounds([70, 20, 5], 0, 100, 0.001)  # 5 draws abstained
      >>> print(f"{float(p_lower):.3f} {float(p_upper):.3f}")
      0.533 0.356
    """
    counts, top = jnp.asarray(counts), jnp.asarray(top)
    if counts.ndim == 0 or counts.shape[-1] < 2:
        raise ValueError(
            f"counts must end with an axis of at least 2 classes, got shape {counts.shape}; for "
            "one class against all the rest use clopper_pearson_lower"
        )
    selected = jnp.arange(counts.shape[-1]) == top[..., None]
    successes = jnp.sum(jnp.where(selected, counts, 0), axis=-1)
    runner_up = jnp.max(jnp.where(selected, 0, counts), axis=-1)
    with jax.enable_x64(True):
        half = jnp.asarray(alpha, jnp.float64) / 2
        return clopper_pearson_lower(successes, n, half), clopper_pearson_upper(runner_up, n, half)
