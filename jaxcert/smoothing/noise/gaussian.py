"""Gaussian noise: one width for all coordinates, or one for each."""

import dataclasses
import hashlib
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from jaxcert.smoothing.noise.base import (
    Additive,
    bounded,
    input_size,
    no_contraction,
    proved,
    require_norm,
    require_scale,
)

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class Gaussian(Additive):
    """Isotropic noise N(0, sigma^2 I), which proves L2 radii (sigma / 2)(Phi^-1(pA) - Phi^-1(pB)).

    The same radius holds in L1, and divided by sqrt(d) in Linf.

    The theorem is about real arithmetic and an exact Gaussian, not about the float program: a
    float32 normal takes at most 2^23 values, none beyond 5.42 sigma, and the rounding of x + noise
    depends on x, so a model that looks at the last bits of its input can tell two certified points
    apart. `GridGaussian` closes that gap for inputs on a grid, such as pixels.

    Attributes:
      sigma: standard deviation, in the units of the input.
      norm: 2, 1 or inf.
    """

    sigma: float
    norm: float = 2.0

    def __post_init__(self):
        require_scale(self, "sigma", "Gaussian(0.25)")
        require_norm(self, (1, 2, math.inf))

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw of N(0, sigma^2 I), in at least float32."""
        return self.sigma * standard_normal(key, shape, dtype)

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """The radius of Theorem 1, rounded down; x is needed for norm=inf only. See `Noise`."""
        with jax.enable_x64(True):
            # The multiplication in `sample` uses sigma rounded to float32.
            sigma = min(self.sigma, float(np.float32(self.sigma)))
            radius = sigma * quantile_distance(p_lower, p_upper)
            if self.norm == math.inf:
                radius = radius / math.sqrt(input_size(self, x, radius)) * (1 - 2.0**-51)
            return radius


def standard_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """One draw of N(0, I), in at least float32, on which no arithmetic is merged."""
    # The flag selects how threefry numbers its counters. Pinned, it gives the same noise under any
    # user configuration; this value is 1.4 times faster on a CPU than the default.
    with jax.threefry_partitionable(False):
        normal = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
    return no_contraction(normal)


# Cohen, Rosenfeld and Kolter (ICML 2019), Theorem 1: R = (sigma / 2)(Phi^-1(pA) - Phi^-1(pB)).
# Half-spaces are the worst case: among all sets of probability pA under N(x, sigma^2),
# {z : <z - x, delta> <= sigma |delta| Phi^-1(pA)} has the least probability under
# N(x + delta, sigma^2), namely Phi(Phi^-1(pA) - |delta| / sigma), and likewise a set of probability
# pB has at most Phi(Phi^-1(pB) + |delta| / sigma). The first stays above the second while
# |delta| < R; `<=` needs the strict rounding down in `proved`.
def quantile_distance(p_lower: Any, p_upper: Any = None) -> Array:
    """(Phi^-1(p_lower) - Phi^-1(p_upper)) / 2, rounded down; 0 where p_lower <= p_upper or NaN."""
    with jax.enable_x64(True):
        p_lower, p_upper = bounded(p_lower, p_upper)
        # ndtri in float64 has a relative error of at most 4e-16 on (1/2, 1), measured against 50
        # digits, and as much of its size elsewhere. Where the two have one sign their difference
        # may be small next to them, so that the slack is counted on each.
        high, low = ndtri(p_lower), ndtri(p_upper)
        cancelled = jnp.where(high * low > 0, jnp.abs(high) + jnp.abs(low), 0.0)
        return proved((high - low - 2.0**-48 * cancelled) / 2, p_lower, p_upper)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ellipsoid:
    """The threat sqrt(sum_i (delta_i / axes_i)^2) <= radius, in place of a norm.

    Hashable: equal where the axes are.

    Attributes:
      axes: float64 array (*input), positive: what a radius of 1 allows in each coordinate alone.
    """

    axes: np.ndarray

    def __post_init__(self):
        axes = np.array(self.axes, np.float64)
        if not (axes.size and np.all(np.isfinite(axes) & (axes > 0))):
            raise ValueError("axes must be positive and finite, one per coordinate of the input")
        axes.flags.writeable = False
        object.__setattr__(self, "axes", axes)

    def _value(self) -> tuple[tuple[int, ...], bytes]:
        return self.axes.shape, self.axes.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ellipsoid) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __repr__(self) -> str:
        shape, data = self._value()
        return f"Ellipsoid(shape={shape}, sha256={hashlib.sha256(data).hexdigest()[:16]})"


@dataclasses.dataclass(frozen=True)
class AnisotropicGaussian(Additive):
    """Noise N(0, diag(sigma^2)), which proves ellipsoids: |delta / sigma|_2 <= Phi^-1(pA).

    Coordinates divided by their sigma make it isotropic (Eiras et al., ANCER, TMLR 2022, Theorem
    2). sigma must be one and the same for all inputs: a sigma chosen per input certifies another
    smoothed model at each, and proves nothing without a memory of the regions given out.

    Attributes:
      threat: `Ellipsoid(sigma)`, sigma of the shape of one input; the radius is in units of it.
    """

    threat: Ellipsoid

    def __post_init__(self):
        if not isinstance(self.threat, Ellipsoid):
            raise TypeError(
                f"threat must be an Ellipsoid, got {type(self.threat).__name__}; type "
                "AnisotropicGaussian(Ellipsoid(sigma)) with one sigma per coordinate"
            )

    @property
    def norm(self) -> Ellipsoid:
        """The threat."""
        return self.threat

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw of N(0, diag(sigma^2)), in at least float32."""
        if shape != self.threat.axes.shape:
            raise ValueError(
                f"the ellipsoid is of inputs of shape {self.threat.axes.shape}, got {shape}"
            )
        normal = standard_normal(key, shape, dtype)
        return normal * jnp.asarray(self.threat.axes.astype(normal.dtype))

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """The multiple of the ellipsoid's axes; see `Noise`."""
        # Each sigma is rounded to float32, relatively by 2^-24 at most.
        with jax.enable_x64(True):
            return quantile_distance(p_lower, p_upper) * (1 - 2.0**-23)
