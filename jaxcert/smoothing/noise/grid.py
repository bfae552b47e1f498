"""Gaussian noise rounded to the grid of the inputs, drawn as integers from its exact law."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.sets import Grid
from jaxcert.smoothing.noise.base import Noise, bounded, input_size, require_norm, require_scale
from jaxcert.smoothing.noise.gaussian import quantile_distance

Array: TypeAlias = jax.Array

MOST = 4096  # grid steps per sigma; the guesses in `integers` are good enough for 10,000


@dataclasses.dataclass(frozen=True)
class GridGaussian(Noise):
    """Noise round(levels N(0, sigma^2)) / levels on inputs k / levels, k integers.

    For integers k, k + round(levels g) = round(k + levels g): the model sees a function of x + g
    for a Gaussian g, the same at every x, so that the radius of `Gaussian` holds between any two
    points of the grid (Voracek and Hein, ICLR 2023). Nothing here rounds: noise is drawn as
    integers from 64 random bits each, and the model receives a value that depends on the integer
    k + K alone. That makes the certificate one about the program that runs, for inputs on the grid,
    where float noise lets a model tell inputs apart by their last bits. The same bits are drawn on
    every device.

    An input that is off the grid is refused, or abstains where it is traced.

    Attributes:
      sigma: standard deviation before rounding, in the units of the input.
      levels: grid points per unit: 255 for pixels k / 255.
      norm: 2, 1 or inf.
    """

    sigma: float
    levels: int = 255
    norm: float = 2.0

    def __post_init__(self):
        require_scale(self, "sigma", "GridGaussian(0.25)")
        require_norm(self, (1, 2, math.inf))
        if not isinstance(self.levels, int) or not 1 <= self.levels <= 2**16:
            raise ValueError(f"levels must be an int in [1, 65536], got {self.levels!r}; e.g. 255")
        if self._scale > MOST:
            raise ValueError(
                f"sigma = {self.sigma} is more than {MOST} steps of 1 / {self.levels}, for which "
                "noise on the grid is not implemented; take fewer levels, or Gaussian"
            )

    @property
    def within(self) -> Grid:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The grid of the inputs."""
        return Grid(self.levels)

    @property
    def inputs(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Multiples of 1 / levels."""
        return grid_inputs(self.levels)

    @property
    def _scale(self) -> float:
        return self.sigma * self.levels

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw of round(levels N(0, sigma^2 I)), int32."""
        return integers(key, shape, self._scale)

    def apply(self, x: Array, drawn: Array) -> Array:
        """The integers divided by the levels, in the type of x."""
        return at_level(nearest_level(x, self.levels) + drawn, self.levels, x.dtype)

    def usable(self, x: Array) -> Array:
        """Whether each of x (b, *input) lies on the grid."""
        return on_grid(x, self.levels)

    def total_variation(self, d: int) -> float:
        """The law that is drawn from is no farther from the exact one, in d coordinates."""
        return d * thresholds(self._scale)[1]

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; needs x for the size of the input."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            d = input_size(self, x, p_lower)
            known = (p_lower < 1) & (p_upper > 0)
            # The law drawn from is at most v from the exact one, in total variation: p_lower - v
            # bounds the exact probability at x, and at x' the drawn law again, of both classes,
            # which a further v on each side covers: the classes' exact probabilities at the radius
            # are then 2 v apart, as 1 / phi is convex.
            v = self.total_variation(d)
            away = quantile_distance(p_lower - 2 * v, p_upper + 2 * v)
            # Grid points are at distances that floats round: q |k - k'| is computed by callers from
            # inputs that are each off by their own rounding.
            radius = jnp.where(known, self.sigma * away * (1 - 2.0**-20), 0.0)
            return radius / math.sqrt(d) * (1 - 2.0**-51) if self.norm == math.inf else radius


def grid_inputs(levels: int) -> str:
    """What inputs on a grid are, for errors."""
    return (
        f"multiples of 1 / {levels}; round pixels to their grid, jnp.round({levels} * x) / "
        f"{levels}, and let the model do all normalisation"
    )


def on_grid(x: Array, levels: int) -> Array:
    """Whether each of x (b, *input) holds numbers k / levels, as its float type rounds them.

    Numbers so large, or of so few digits, that their k is uncertain are none.
    """
    x = jnp.asarray(x)
    k = nearest_level(x, levels)
    # float32 pixels may be off by a unit, also after a cast to float64.
    unit = 2.0**-23 if jnp.finfo(x.dtype).eps <= 2.0**-23 else 0.0
    before, point, after = (at_level(k + step, levels, x.dtype) for step in (-1, 0, 1))
    near = jnp.abs(x - point) <= unit * jnp.abs(point)
    certain = (before < point) & (point < after) & (jnp.abs(k) * unit <= 0.25)
    return jnp.all(jnp.isfinite(x) & near & certain, axis=tuple(range(1, x.ndim)))


def at_level(k: Array, levels: int, dtype: Any) -> Array:
    """k / levels, rounded to a float type."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return (k.astype(wide) / levels).astype(dtype)


def nearest_level(x: Array, levels: int) -> Array:
    """The integer nearest to levels x, int32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.round(x.astype(wide) * levels).astype(jnp.int32)


# K = round(scale N) has P(|K| >= m) = erfc((m - 1/2) / (scale sqrt 2)) =: S_m for m >= 1. With u
# uniform on the integers below 2^63, |K| = #{m : u < 2^63 S_m}, and one more bit is the sign.
@functools.cache
def thresholds(scale: float) -> tuple[np.ndarray, float]:
    """2^63 S_m as two words uint32 (2, M) for m = 0, 1, ..., and the total variation of the law.

    The last threshold is 0. The second value bounds the distance between the law of K and the law
    that is drawn from.
    """
    from scipy.special import erfc

    last = math.ceil(9.5 * scale) + 1
    middle = (np.arange(1, last + 1) - 0.5) / (scale * math.sqrt(2))
    scaled = [int(share * 2.0**63) for share in erfc(middle)]
    # The few integers below 2^12 are left out: there, flooring would move the thresholds by steps.
    kept = [2**63, *(s for s in scaled if s >= 2**12), 0]
    words = np.array([[s >> 32 for s in kept], [s & 0xFFFFFFFF for s in kept]], np.uint32)
    # erfc is off by 2 units relative, its argument by 3, which moves erfc by at most as many units
    # of 2^-53, and flooring by 2^-63: 8 units in all for each of the thresholds, each of which is
    # in two probabilities; the total variation is half the sum of their differences.
    return words, len(kept) * 8 * 2.0**-53 + 2.0**-51


def integers(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    """One draw of round(scale N(0, I)), int32, from 64 bits of the key for each."""
    words, _ = thresholds(scale)
    high_table, low_table = (jnp.asarray(row) for row in words)
    with jax.threefry_partitionable(False):  # as in `standard_normal`
        high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    negative = (high >> 31).astype(bool)
    high = high & np.uint32(0x7FFFFFFF)
    # |K| is m - 1 or m for the m whose threshold is nearest to u. A float32 quantile finds m for
    # sure, since it errs by less than half a step (`test_guesses_are_within_half_a_step`); the
    # comparison of integers decides. So what compilers do to the quantile changes no draw.
    m = jnp.round(_guess(high, low, scale)).astype(jnp.int32)
    m = jnp.clip(m, 1, words.shape[1] - 1)
    high_m, low_m = high_table[m], low_table[m]
    reached = (high < high_m) | ((high == high_m) & (low < low_m))
    size = m - 1 + reached.astype(jnp.int32)
    return jnp.where(negative, -size, size)


def _guess(high: Array, low: Array, scale: float) -> Array:
    """The real y with erfc((y - 1/2) / (scale sqrt 2)) = (2^32 high + low + 1/2) / 2^63, nearly."""
    # In float32 the small numbers of the tail keep their relative precision.
    share = high.astype(jnp.float32) * 2.0**-31 + (low.astype(jnp.float32) + 0.5) * 2.0**-63
    # erfc^-1(s) = (1 - s) q(w) with w = -log(s (2 - s)), q a polynomial in w in the middle and in
    # sqrt(w) in the tail, as Giles does for erf^-1 (GPU Computing Gems 2011).
    w = -jnp.log(share * (2 - share))
    middle, tail = _polynomials()
    value = jnp.where(w < TAIL, middle(w), tail(jnp.sqrt(jnp.maximum(w, TAIL))))
    return (scale * math.sqrt(2)) * ((1 - share) * value) + 0.5


TAIL = 6.0


@functools.cache
def _polynomials() -> tuple[Any, Any]:
    """q of w on [0, TAIL], and of sqrt(w) up to the least share; relative errors of 4e-7."""
    from scipy.special import erfcinv

    def ratio(w: np.ndarray) -> np.ndarray:
        e = np.exp(-w)
        share = e / (1 + np.sqrt(1 - e))
        return erfcinv(share) / (1 - share)

    fit = functools.partial(np.polynomial.Chebyshev.interpolate, deg=7)
    ends = math.sqrt(TAIL), 6.75  # 6.75^2 > 64 log 2
    return _horner(fit(ratio, domain=(1e-9, TAIL))), _horner(
        fit(lambda root: ratio(root * root), domain=ends)
    )


def _horner(fitted: np.polynomial.Chebyshev) -> Any:
    """A Chebyshev interpolant as a function of float32 arrays."""
    shift, scale = fitted.mapparms()
    powers = np.polynomial.chebyshev.cheb2poly(fitted.coef).astype(np.float32)

    def evaluate(t: Array) -> Array:
        t = np.float32(shift) + np.float32(scale) * t
        value = jnp.full_like(t, powers[-1])
        for power in powers[-2::-1]:
            value = value * t + power
        return value

    return evaluate
