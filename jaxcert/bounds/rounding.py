"""Rounding error terms: what makes a bound computed in floating point a proof.

Model of arithmetic (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 2.2
and 3.1), in float64 with unit roundoff u = 2^-53: a computed elementwise result fl(z) obeys
|fl(z) - z| <= k u |fl(z)| + tiny, where k is a documented number of units per function and tiny,
the smallest normal number, covers results that are flushed to zero; a sum of n products obeys
|fl(s) - s| <= gamma_n sum |a_i b_i| + 2 n tiny in any order of summation. Inputs and weights that
are themselves subnormal in float64, below 2^-1022, are read as zero on CPUs, and count as zero.
"""

from typing import Any

import jax.numpy as jnp

from jaxcert.floats import rounded_down, rounded_up
from jaxcert.sets import Array, Box

UNIT = 2.0**-53
TINY = 2.0**-1022

# Units k per function: at least 4 times the largest error seen of XLA on CPU against 140-bit
# arithmetic (tests/bounds/test_rounding.py repeats the comparison). Basic arithmetic gets 4 because
# XLA may turn a division by a constant into a product with its reciprocal (1.4 units seen).
ARITHMETIC = 4
UNITS = {
    "sqrt": 4, "rsqrt": 8, "cbrt": 512, "exp": 8, "exp2": 4096, "expm1": 16, "log": 8,
    "log1p": 4096, "tanh": 32, "logistic": 16, "erf": 16, "erfc": 4096, "erf_inv": 2**23,
    "sin": 8, "cos": 8, "sinh": 4096, "cosh": 4096, "asinh": 16, "atan": 16, "pow": 16,
}  # fmt: skip


def widen(box: Box, units: float) -> Box:
    """The box grown by `units` u of each end plus a few tiny, its own rounding included.

    With e = |l| (units + 2) u + 4 tiny, computed with relative error below 4u, fl(l - e) is at most
    l - e + u |l - e| + tiny <= l - units u |l| - tiny. The derivative in l is 1 up to rounding.
    """
    lower = box.lower - (jnp.abs(box.lower) * ((units + 2) * UNIT) + 4 * TINY)
    upper = box.upper + (jnp.abs(box.upper) * ((units + 2) * UNIT) + 4 * TINY)
    return Box(lower, upper)


def gamma(n: int, unit: float = UNIT) -> float:
    """gamma_n = n u / (1 - n u), rounded up; for n u >= 1/2 there is no such bound."""
    return 1.001 * n * unit / (1 - n * unit) if 2 * n * unit < 1 else float("inf")


def inflate(error: Array, n: int) -> Array:
    """An error bound >= 0 that itself came out of an n-term sum, raised above its exact value."""
    return error * (1 + 2 * gamma(n + 4)) + 4 * (n + 1) * TINY


def unit(dtype: Any) -> float:
    """The unit roundoff of a float type."""
    return float(jnp.finfo(dtype).eps) / 2


def narrow(box: Box, dtype: Any) -> Box:
    """The box in a narrower float type, ends rounded outward; NaN stays NaN."""
    return Box(rounded_down(box.lower, dtype), rounded_up(box.upper, dtype))
