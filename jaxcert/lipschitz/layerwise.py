"""Lipschitz constants of chains from norms of layers and of their products, proved in float64."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxcert.bounds.rounding import UNIT
from jaxcert.lipschitz import constants
from jaxcert.lipschitz.ellipsoids import (
    FLOOR,
    Layer,
    gamma_n,
    middle_and_spread,
    norm_bound,
    product,
)
from jaxcert.lipschitz.slopes import Slopes
from jaxcert.lipschitz.spectral import dot, frobenius
from jaxcert.sets import Array


def product_of_norms(layers: Sequence[Layer], slopes: Sequence[Slopes]) -> Array:
    """prod ||W_i|| max |slope|, a bound on the constant: 0 without layers, inf for no knowledge."""
    if not layers:
        return jnp.zeros(())
    steepest = [jnp.max(jnp.maximum(jnp.abs(least), jnp.abs(most))) for least, most in slopes]
    norms = [norm_bound(layer) for layer in layers]
    return product([*norms, *(layer.scale for layer in layers), *steepest])


# Let d_k bound |dz_k| / |dx_0|. With dx_i = m dz_i + w_i, |w_i| <= r |dz_i| (see `ellipsoids.py`),
#
#   dz_k = W_k m W_{k-1} .. m W_1 dx_0 + sum_{j<k} W_k m W_{k-1} .. m W_{j+1} w_j,
#   d_k  = ||W_k m W_{k-1} .. W_1|| + sum_{j<k} ||W_k m W_{k-1} .. m W_{j+1} r_j|| d_j,
#
# and d_l bounds the constant. For relu, m = r = 1/2, this is LipLT's recursion (Fazlyab et al.,
# NeurIPS 2023). Products are carried with a bound on their error in the Frobenius norm.


def liplt(layers: Sequence[Layer], slopes: Sequence[Slopes]) -> Array:
    """LipLT for any slopes: a bound on the constant."""
    if not layers:
        return jnp.zeros(())
    paths: list[tuple[Array, Array, Array]] = []  # product, its error, d_j
    reached = jnp.ones(())
    for i, layer in enumerate(layers):
        if i == 0:
            paths = [(layer.matrix, layer.error, reached)]
        else:
            m, r = middle_and_spread(slopes[i - 1])
            paths = [(*_times(layer, m, matrix, error), d) for matrix, error, d in paths]
            scaled = layer.matrix * r
            off = (layer.error + 4 * UNIT * frobenius(layer.matrix)) * jnp.max(r)
            paths.append((scaled, 2 * off + FLOOR, reached))
        norms = [(constants.dense(a) + e) * d * (1 + 8 * UNIT) for a, e, d in paths]
        reached = jnp.sum(jnp.stack(norms)) * (1 + 4 * len(layers) * UNIT)
    return product([reached, *(layer.scale for layer in layers)])


def _times(layer: Layer, m: Array, matrix: Array, error: Array) -> tuple[Array, Array]:
    """W m A, for W and A known up to errors."""
    w, scaled = frobenius(layer.matrix), m[:, None] * matrix
    rounding = gamma_n(*layer.matrix.shape) * w * frobenius(scaled)
    steepest = jnp.max(jnp.abs(m))
    known = layer.error * frobenius(scaled) + (w + layer.error) * steepest * error
    return dot(layer.matrix, scaled), 2 * (rounding + known) + FLOOR
