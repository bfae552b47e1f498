"""Noise whose density falls with the Linf norm: exponentially, or as a power."""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.smoothing.noise.base import (
    Additive,
    bounded,
    input_size,
    proved,
    require_norm,
    require_scale,
)
from jaxcert.smoothing.noise.laplace import ratio_distance
from jaxcert.smoothing.noise.uniform import symmetric_uniform

Array: TypeAlias = jax.Array

# `sample` draws lengths in float32, from gammas whose relative error grows with nothing but ulps.
SAMPLED = 1 - 2.0**-18


@dataclasses.dataclass(frozen=True)
class ExpInf(Additive):
    """Noise of density |z|_inf^-pole exp(-(|z|_inf / scale)^power), for L1 and Linf.

    Among the families of Yang et al. (ICML 2020) these win in Linf (power 1, pole 0) and are close
    to the best in L1 (poles just below d).

    Attributes:
      scale: in the units of the input. |z|_inf is about (d / power)^(1 / power) scale.
      power: the exponent k.
      pole: the exponent j < d - 1 of the pole at 0.
      norm: 1 or inf; inf for power 1 and pole 0 only.
    """

    scale: float
    power: float = 1.0
    pole: float = 0.0
    norm: float = 1.0

    def __post_init__(self):
        require_scale(self, "scale", "ExpInf(0.01)")
        require_scale(self, "power", "ExpInf(0.01, power=2.0)")
        require_norm(self, (1, math.inf))
        if not (isinstance(self.pole, int | float) and 0 <= self.pole < math.inf):
            raise ValueError(f"pole must be 0 or more, got {self.pole}")
        if self.norm == math.inf and (self.power, self.pole) != (1, 0):
            raise ValueError("norm=inf is proved for power=1.0 and pole=0.0 only")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw, in at least float32."""
        d = self._checked_size(math.prod(shape))
        with jax.threefry_partitionable(False):
            length, rest = jax.random.split(key)
        direction = _on_the_cube(rest, shape, dtype)
        # The density of the length r is r^(d - 1 - pole) exp(-(r / scale)^power).
        with jax.threefry_partitionable(False):
            gamma = jax.random.gamma(length, self._gamma_shape(d), (), direction.dtype)
        return self.scale * gamma ** (1 / self.power) * direction

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; needs x for the size of the input, with norm=1."""
        with jax.enable_x64(True):
            scale = min(self.scale, float(np.float32(self.scale))) * SAMPLED
            p_lower, p_upper = bounded(p_lower, p_upper)
            if self.norm == math.inf:
                # |z - delta|_inf >= |z|_inf - r: the density changes by a factor e^(r/scale).
                return proved(scale * ratio_distance(p_lower, p_upper), p_lower, p_upper)
            d = self._checked_size(input_size(self, x, p_lower))
            # r^power / scale^power is Gamma((d - pole) / power), so that E[1 / r] is a quotient of
            # gamma functions.
            a = self._gamma_shape(d)
            less = a - 1 / self.power
            logs = math.lgamma(a), math.lgamma(less)
            rounding = 8 * 2.0**-53 * (1 + abs(logs[0]) + abs(logs[1]) + a / less)
            mean_inverse = math.exp(logs[1] - logs[0] + rounding)
            return proved(scale * _l1_distance(p_lower, p_upper, d, mean_inverse), p_lower, p_upper)

    def _gamma_shape(self, d: int) -> float:
        """(d - pole) / power, rounded to float32: that of (length / scale)^power as it is drawn."""
        return float(np.float32((d - self.pole) / self.power))

    def _checked_size(self, d: int) -> int:
        if not (d >= 2 and self.pole < d - 1 and self._gamma_shape(d) > 1 / self.power):
            raise ValueError(
                f"ExpInf needs inputs of 2 coordinates or more and a pole below d - 1, got d = {d} "
                f"and pole = {self.pole}"
            )
        return d


@dataclasses.dataclass(frozen=True)
class PowInf(Additive):
    """Noise of density (1 + |z|_inf / scale)^-power, for L1 (Yang et al., ICML 2020).

    Attributes:
      scale: in the units of the input.
      power: the exponent, above d.
    """

    scale: float
    power: float
    norm: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self):
        require_scale(self, "scale", "PowInf(1.0, power=2 * d)")
        require_scale(self, "power", "PowInf(1.0, power=2 * d)")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw, in at least float32."""
        d = self._checked_size(math.prod(shape))
        with jax.threefry_partitionable(False):
            first, second, rest = jax.random.split(key, 3)
        direction = _on_the_cube(rest, shape, dtype)
        # r / scale has density r^(d - 1) (1 + r)^-power: a quotient of gammas (beta prime).
        with jax.threefry_partitionable(False):
            top = jax.random.gamma(first, d, (), direction.dtype)
            bottom = jax.random.gamma(second, self._excess(d), (), direction.dtype)
        return self.scale * (top / bottom) * direction

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; needs x for the size of the input."""
        with jax.enable_x64(True):
            scale = min(self.scale, float(np.float32(self.scale))) * SAMPLED
            p_lower, p_upper = bounded(p_lower, p_upper)
            d = self._checked_size(input_size(self, x, p_lower))
            # The mean of the inverse of a beta prime variable of (d, power - d).
            mean_inverse = self._excess(d) / (d - 1)
            return proved(scale * _l1_distance(p_lower, p_upper, d, mean_inverse), p_lower, p_upper)

    def _excess(self, d: int) -> float:
        """power - d, rounded to float32, as it is drawn with."""
        return float(np.float32(self.power - d))

    def _checked_size(self, d: int) -> int:
        if not (d >= 2 and self._excess(d) > 0):
            raise ValueError(
                f"PowInf needs inputs of 2 coordinates or more and a power above d, got d = {d} "
                f"and power = {self.power}; type power=2.0 * {d}"
            )
        return d


def _on_the_cube(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A point uniform on the surface of [-1, 1]^shape: a face, and a place on it."""
    with jax.threefry_partitionable(False):
        face, side, place = jax.random.split(key, 3)
    point = symmetric_uniform(place, shape, dtype)
    d = math.prod(shape)
    with jax.threefry_partitionable(False):
        coordinate = jax.random.randint(face, (), 0, d, jnp.int32)
        negative = jax.random.bits(side, (), jnp.uint32) >> 31
    sign = jnp.where(negative == 1, -1, 1).astype(point.dtype)
    return jnp.where(jnp.arange(d).reshape(shape) == coordinate, sign, point)


# Let q(z) = g(|z|_inf) be a density with g falling. Along a coordinate, q changes only on the two
# pyramids where that coordinate is the largest, and moving any set A of the space against it gains
# probability at a rate of at most
#   c = int -g'(r) (2r)^(d-1) dr = 2 (d-1) int g(r) (2r)^(d-2) dr = (d-1)/(2d) E[1 / |z|_inf]
# (by parts, and |z|_inf has the density 2d g(r) (2r)^(d-1)). In a direction e the rates add up to
# sum_i |e_i| c = |e|_1 c. So P'(A) >= pA - c |delta|_1, P'(B) <= pB + c |delta|_1, and the class
# leads while |delta|_1 < (pA - pB) / 2c: the differential method of Yang et al. (ICML 2020).
def _l1_distance(p_lower: Array, p_upper: Array, d: int, mean_inverse: float) -> Array:
    """The L1 radius over the scale, given the mean of scale / |z|_inf; inside x64."""
    return (p_lower - p_upper) * (d / ((d - 1) * mean_inverse) * (1 - 2.0**-50))
