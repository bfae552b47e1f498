"""Noise whose density falls with the L1 norm: Laplace."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.smoothing.noise.base import (
    Additive,
    bounded,
    no_contraction,
    proved,
    require_scale,
)

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class Laplace(Additive):
    """Noise of density exp(-|z|_1 / scale) in all coordinates, for L1.

    Attributes:
      scale: of each coordinate, in the units of the input; its standard deviation is
        sqrt(2) scale.
    """

    scale: float
    norm: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self):
        require_scale(self, "scale", "Laplace(0.25)")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw, in at least float32."""
        with jax.threefry_partitionable(False):  # as in `standard_normal`
            draw = jax.random.laplace(key, shape, jnp.promote_types(dtype, jnp.float32))
        return self.scale * no_contraction(draw)

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """The radius of Teng, Lee and Yuan (2020), Theorem 1, rounded down; see `Noise`."""
        with jax.enable_x64(True):
            scale = min(self.scale, float(np.float32(self.scale)))
            p_lower, p_upper = bounded(p_lower, p_upper)
            return proved(scale * ratio_distance(p_lower, p_upper), p_lower, p_upper)


# If moving the input by r changes the density nowhere by more than a factor e^(r / scale), then
# P'(A) >= e^(-r/scale) pA, P'(B) <= e^(r/scale) pB, and, for the complement of A,
# P'(A) >= 1 - e^(r/scale) (1 - pA). The class leads while
#   r / scale < log(pA / pB) / 2      by the first two, and while
#   r / scale < -log(1 - pA + pB)     by the last two.
def ratio_distance(p_lower: Array, p_upper: Array) -> Array:
    """r / scale for a density that changes by a factor e^(r / scale) at most; inside x64."""
    # log1p, since pA - pB may be small, and the logarithm of a quotient near 1 as well.
    halves = jnp.log1p((p_lower - p_upper) / p_upper) / 2
    # 1 - pA + pB is near 1 for a small pA - pB, and loses what is left of 1 for a large one.
    lead = p_lower - p_upper
    wholes = jnp.where(lead < 0.5, -jnp.log1p(-lead), -jnp.log((1 - p_lower) + p_upper))
    return jnp.maximum(halves, wholes)
