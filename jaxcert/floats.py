"""Floating point that proofs can rely on: directed rounding, and float64 as IEEE defines it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.model import is_traced


def rounded_down(x: jax.Array, dtype: Any) -> jax.Array:
    """x in another float type, never above x; NaN stays NaN."""
    return _rounded(x, dtype, -jnp.inf)


def rounded_up(x: jax.Array, dtype: Any) -> jax.Array:
    """x in another float type, never below x; NaN stays NaN."""
    return _rounded(x, dtype, jnp.inf)


def _rounded(x: jax.Array, dtype: Any, towards: float) -> jax.Array:
    nearest = x.astype(dtype)
    if nearest.dtype == x.dtype:
        return x
    back = nearest.astype(x.dtype)
    overshot = back > x if towards < 0 else back < x
    rounded = jnp.where(overshot, _next(nearest, jnp.full_like(nearest, towards)), nearest)
    # Below the smallest normal number results are flushed to zero, whose neighbour may not be far
    # enough: there the result is zero, or the normal number on the other side of x.
    tiny = float(jnp.finfo(dtype).tiny)
    away = x < 0 if towards < 0 else x > 0
    edge = jnp.where(away, math.copysign(tiny, towards), 0.0).astype(dtype)
    return jnp.where((jnp.abs(x) < tiny) & (x != 0), edge, rounded)


@jax.custom_jvp
def _next(x: jax.Array, towards: jax.Array) -> jax.Array:
    return jnp.nextafter(x, towards)


@_next.defjvp
def _(primals, tangents):
    return _next(*primals), tangents[0]


def ieee_float64(tree: Any) -> Any:
    """Arrays placed where float64 arithmetic rounds as IEEE 754 says.

    On a TPU, which emulates float64 with fewer bits, they move to the host's CPU; elsewhere they
    stay.

    Raises:
      RuntimeError: on a TPU under jit, where they cannot be moved.
    """
    if jax.default_backend() != "tpu":
        return tree
    if is_traced(tree):
        raise RuntimeError(
            "a proof needs IEEE float64, which TPUs lack: call the certifier outside of jit (it "
            "then runs on the host's CPU), or place the whole program with jax.default_device"
        )
    return jax.device_put(tree, jax.devices("cpu")[0])
