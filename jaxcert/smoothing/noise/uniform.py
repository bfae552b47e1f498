"""Uniform noise, on a cube and on a ball."""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.sets import Box
from jaxcert.smoothing.confidence import upper_tail
from jaxcert.smoothing.noise.base import (
    Additive,
    bounded,
    input_shape,
    input_size,
    no_contraction,
    proved,
    require_norm,
    require_scale,
)
from jaxcert.smoothing.noise.gaussian import standard_normal

Array: TypeAlias = jax.Array

HALVINGS = 60


def symmetric_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """One draw from [-1, 1]^shape, in at least float32."""
    with jax.threefry_partitionable(False):  # as in `standard_normal`
        dtype = jnp.promote_types(dtype, jnp.float32)
        return no_contraction(jax.random.uniform(key, shape, dtype, -1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Uniform(Additive):
    """Noise uniform on the cube [-width, width]^d, for L1 and Linf.

    The cubes around x and x + delta share prod_i (1 - |delta_i| / 2 width) of their volume, and
    the votes can differ on the rest only.

    Attributes:
      width: half the cube's side, in the units of the input.
      norm: 1 or inf.
      unit_box: claim the L1 radius for inputs in [0, 1]^d only, where it is larger (Voracek and
        Hein, ICML 2023).
    """

    width: float
    norm: float = 1.0
    unit_box: bool = False
    inputs = "finite numbers, in [0, 1] for unit_box=True; let the model do all normalisation"

    def __post_init__(self):
        require_scale(self, "width", "Uniform(0.5)")
        require_norm(self, (1, math.inf))
        if self.unit_box and self.norm != 1:
            raise ValueError("unit_box=True improves L1 radii; type norm=1, or unit_box=False")

    @property
    def within(self) -> Box | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[0, 1] where the radius is about that box."""
        return Box(0.0, 1.0) if self.unit_box else None

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw, in at least float32."""
        return self.width * symmetric_uniform(key, shape, dtype)

    def usable(self, x: Array) -> Array:
        """Whether all values are finite, and in [0, 1] where the radius is about that box."""
        inside = (x >= 0) & (x <= 1) if self.unit_box else jnp.isfinite(x)
        return jnp.all(inside, axis=tuple(range(1, x.ndim)))

    # Outside of the shared volume, whose share is V, the votes may be anything: the class keeps at
    # least pA - (1 - V), any other has at most pB + (1 - V), so all is well while
    # V > 1 - (pA - pB) / 2 =: t.
    #   L1: V >= 1 - |delta|_1 / 2 width (Weierstrass), so R = width (pA - pB) (Lee et al. 2019).
    #   Linf: V >= (1 - r / 2 width)^d, so R = 2 width (1 - t^(1/d)) (Yang et al., ICML 2020).
    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; x is needed for norm=inf and with `unit_box`."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            gap = p_lower - p_upper
            width = min(self.width, float(np.float32(self.width)))  # as `sample` rounds it
            if self.norm == math.inf:
                d = input_size(self, x, p_lower)
                radius = -2 * width * jnp.expm1(jnp.log1p(-gap / 2) / d)
            elif self.unit_box:
                shape = input_shape(self, x, p_lower)
                moves = jnp.reshape(jnp.asarray(x, jnp.float64), (*p_lower.shape, math.prod(shape)))
                radius = _radius_in_box(moves, 1 - gap / 2, width)
            else:
                radius = width * gap
            return proved(radius, p_lower, p_upper)


# With |delta_i| <= m_i := max(x_i, 1 - x_i), the shared volume of all delta of L1 norm r is least
# where the largest m_i are used up one after the other: log(1 - |delta_i| / 2 width) is concave, so
# that its sum is Schur-concave in |delta|, and that delta majorises every other (Voracek and Hein,
# ICML 2023). With c coordinates used up, s is spent and P = prod (1 - m_i / 2 width) is shared; the
# next one may move by u with P (1 - u / 2 width) = t.
def _radius_in_box(x: Array, t: Array, width: float) -> Array:
    """The L1 radius within [0, 1]^d; x (..., d) and the volume t (...) that must be shared."""
    inside = jnp.all((x >= 0) & (x <= 1), axis=-1)
    m = -jnp.sort(-jnp.maximum(x, 1 - x), axis=-1)
    # Every product and sum below errs by at most d units of 2^-53 relative; t is raised and the
    # sum lowered by eight times that.
    d = x.shape[-1]
    slack = 8 * (d + 2) * 2.0**-53
    t = t * (1 + slack)

    def use(carry: tuple[Array, ...], m_c: Array) -> tuple[tuple[Array, ...], None]:
        spent, shared, radius, ended = carry
        u = 2 * width * (1 - t / shared)
        ends = ~ended & (u <= m_c)
        radius = jnp.where(ends, spent + jnp.maximum(u, 0.0), radius)
        return (spent + m_c, shared * (1 - m_c / (2 * width)), radius, ended | ends), None

    start = (jnp.zeros_like(t), jnp.ones_like(t), jnp.zeros_like(t), jnp.zeros(t.shape, bool))
    (spent, _, radius, ended), _ = jax.lax.scan(use, start, jnp.moveaxis(m, -1, 0))
    radius = jnp.where(ended, radius, spent) * (1 - slack)  # never ended: all of the box
    return jnp.where(inside, radius, 0.0)


@dataclasses.dataclass(frozen=True)
class UniformBall(Additive):
    """Noise uniform on the L2 ball of radius `width`, for L2 (Yang et al., ICML 2020).

    Attributes:
      width: the ball's radius, in the units of the input.
    """

    width: float
    norm: float = dataclasses.field(default=2.0, init=False)

    def __post_init__(self):
        require_scale(self, "width", "UniformBall(10.0)")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw, in at least float32."""
        with jax.threefry_partitionable(False):
            direction, length = jax.random.split(key)
        normal = standard_normal(direction, shape, dtype)
        with jax.threefry_partitionable(False):
            u = jax.random.uniform(length, (), normal.dtype)
        norm = jnp.sqrt(jnp.sum(normal * normal))
        return normal * (self.width * u ** (1 / math.prod(shape)) / norm)

    # Two balls of radius w at a distance r share I_{1/2 - r/4w}((d+1)/2, (d+1)/2) * 2 of their
    # volume (two caps), I the regularised incomplete beta function. As for the cube, all is well
    # while that exceeds 1 - (pA - pB) / 2.
    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; needs x for the size of the input."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            d = input_size(self, x, p_lower)
            shared = (1 - (p_lower - p_upper) / 2) * (1 + 2.0**-50)
            cap = _beta_quantile_above(shared / 2, d)
            width = min(self.width, float(np.float32(self.width))) * (1 - 2.0**-20)  # of `sample`
            return proved(width * (2 - 4 * cap), p_lower, p_upper)


def _beta_quantile_above(probability: Array, d: int) -> Array:
    """z <= 1/2 with I_z((d+1)/2, (d+1)/2) >= probability for sure, close to the least one; x64."""
    a = (d + 1) / 2
    excess = 64 * 2.0**-52 * (100 + d * math.log(d))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        # I_z(a, a) is P[Binomial(d, z) >= a] continued to half-integers, which `upper_tail` exceeds
        # by 32 eps (100 + d log d) at most, of its size; 1 says that nothing is known.
        tail = upper_tail(a, d, middle)
        enough = (tail < 1) & (tail * (1 - excess) >= probability)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    zero = jnp.zeros_like(probability)
    _, high = jax.lax.fori_loop(0, HALVINGS, halve, (zero, zero + 0.5))
    return high
