"""Noise distributions, and the radius each one proves."""

import dataclasses
import math
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

Array: TypeAlias = jax.Array


@runtime_checkable
class Noise(Protocol):
    """What a distribution must offer: additive noise, and what agreement under it proves.

    Implementations are frozen and hashable, so that jit takes them as static arguments.
    """

    @property
    def norm(self) -> float:
        """The norm of the radius, as numpy's `ord`."""
        ...

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw; the same bits for the same key, whatever the caller batches over."""
        ...

    def radius(self, p_lower: Array) -> Array:
        """float64 (...): where a class of probability >= p_lower stays the likeliest one."""
        ...


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Isotropic noise N(0, sigma^2 I), which proves L2 radii sigma Phi^-1(p_lower).

    The theorem is about real arithmetic and an exact Gaussian, not about the float program: a
    float32 normal takes at most 2^23 values, none beyond 5.42 sigma, and the rounding of x + noise
    depends on x, so a model that looks at the last bits of its input can tell two certified points
    apart. Noise on the grid of the pixel values, which closes that gap, is planned.

    Attributes:
      sigma: standard deviation, in the units of the input.
    """

    sigma: float
    norm: ClassVar[float] = 2.0

    def __post_init__(self):
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(
                f"sigma must be a positive number, got {self.sigma}; it is in the units of the "
                "input, e.g. Gaussian(0.25) for pixels in [0, 1]"
            )

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw of N(0, sigma^2 I), in at least float32."""
        # The flag selects how threefry numbers its counters. Pinned, it gives the same noise under
        # any user configuration; this value is 1.4 times faster on a CPU than the default.
        with jax.threefry_partitionable(False):
            normal = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
        return self.sigma * no_contraction(normal)

    # Cohen, Rosenfeld and Kolter (ICML 2019), Theorem 1 with p_B = 1 - p_A: R = sigma Phi^-1(p_A).
    # A half-space is the worst case: among all sets of probability p_A under N(x, sigma^2),
    # {z : <z - x, delta> <= sigma |delta| Phi^-1(p_A)} has the least probability under
    # N(x + delta, sigma^2), namely Phi(Phi^-1(p_A) - |delta| / sigma), which stays above 1/2 while
    # |delta| < R. At |delta| = R it is 1/2, so `<=` needs the strict rounding down below.
    def radius(self, p_lower: Array) -> Array:
        """The radius of Theorem 1, rounded down; 0 where p_lower <= 1/2 or NaN.

        Args:
          p_lower: float64 (...), a lower bound on the probability of the predicted class.

        Returns:
          float64 (...), in the units of the input.
        """
        with jax.enable_x64(True):
            # The multiplication in `sample` uses sigma rounded to float32.
            sigma = min(self.sigma, float(np.float32(self.sigma)))
            # ndtri in float64 has a relative error of at most 4e-16 on (1/2, 1), measured against
            # 50 digits; the product adds 2e-16. The slack 2^-48 = 3.6e-15 covers both, six times.
            quantile = ndtri(jnp.asarray(p_lower, jnp.float64)) * (1 - 2.0**-48)
            proved = (p_lower > 0.5) & (p_lower < 1)
            return jnp.where(proved, sigma * quantile, 0.0)


def no_contraction(value: Array) -> Array:
    """The same finite values, in a form that ends any arithmetic the compiler may merge.

    XLA merges products by constants, and contracts a product and a sum to one operation with one
    rounding, for some shapes of the batch and not for others. A maximum in between forbids both
    (`lax.optimization_barrier` does not: it is gone before contraction).
    """
    return jnp.maximum(value, jnp.finfo(value.dtype).min)
