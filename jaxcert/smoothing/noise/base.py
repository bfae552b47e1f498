"""What a noise distribution must offer, and arithmetic that all of them share."""

import abc
import dataclasses
import math
from numbers import Real
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

from jaxcert.sets import Box, Grid

Array: TypeAlias = jax.Array

# Elementary functions in float64 are off by a few units of 2^-53 on every backend that does float64
# at all (measured against 50 digits for ndtri: 4). Radii are shrunk by this much, eight times that.
SLACK = 2.0**-48


class Noise(abc.ABC):
    """A distribution of noisy copies of an input, and what agreement on them proves.

    Implementations are frozen dataclasses, which jit takes as static arguments, and of `jax.numpy`
    throughout, as all methods are traced. Noise that is added to the input is an `Additive`.

    Example:
      >>> from jax.scipy.special import ndtri
      >>> from jaxcert import smoothing
      >>> @dataclasses.dataclass(frozen=True)
      ... class Correlated(smoothing.Additive):
      ...     sigma: float
      ...     norm = 2.0
      ...     def sample(self, key, shape, dtype):  # a constant besides makes it no worse
      ...         own, common = (jax.random.normal(k, shape, dtype) for k in jax.random.split(key))
      ...         return self.sigma * (own + common.mean())
      ...     def radius(self, p_lower, p_upper=None, x=None):
      ...         return 0.999 * self.sigma * jnp.maximum(ndtri(p_lower), 0.0)
      >>> plan = smoothing.SmoothingPlan(noise=Correlated(0.5), n=1000)

    Attributes:
      norm: the norm of the radius as numpy's `ord`, or a threat of its own such as `Ellipsoid`.
      within: where the inputs lie that the radius speaks of, or None for everywhere.
      inputs: what inputs must hold to be `usable`, and how to make them so; for errors.
    """

    norm: Any
    within: Box | Grid | None = None
    inputs: str = "finite numbers"

    @abc.abstractmethod
    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """One draw for an input of this shape and type, made without looking at the input.

        The same bits for the same key, whatever is batched over.
        """

    @abc.abstractmethod
    def apply(self, x: Array, drawn: Array) -> Array:
        """What the model receives of x (*input), given a draw; it may differ from x in shape."""

    @abc.abstractmethod
    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """float64 (...): up to which distance a class stays the likeliest one, rounded down.

        Args:
          p_lower: (...), at most the probability of the class at x.
          p_upper: (...), at least the probability of every other class; default 1 - p_lower.
          x: (..., *input), the inputs; noise whose radius depends on them, or on their size, says
            so and needs them.

        Returns:
          0 where nothing is proved.
        """

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of x (*input)."""
        return self.apply(x, self.sample(key, x.shape, x.dtype))

    def usable(self, x: Array) -> Array:
        """Which of x (b, *input) the distribution is defined for; bool (b,)."""
        return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


class Additive(Noise):
    """Noise that is added to the input; `sample` draws it in float32 at least."""

    def apply(self, x: Array, drawn: Array) -> Array:
        """The sum, in the type of x."""
        return (x + no_contraction(drawn)).astype(x.dtype)

    def perturb(self, key: Array, x: Array) -> Array:
        """One noisy copy of x (*input)."""
        # In one dimension: XLA:CPU vectorises along the last axis, which may be a single channel.
        drawn = self.sample(key, x.shape, x.dtype)
        return self.apply(x.reshape(-1), drawn.reshape(-1)).reshape(x.shape)


def draws_of(noise: Noise) -> tuple[Any, ...]:
    """What the draws depend on: all of a distribution but what its radius is claimed for."""
    fields = [
        f.name for f in dataclasses.fields(cast(Any, noise)) if f.name not in ("norm", "unit_box")
    ]
    return (type(noise), *(getattr(noise, name) for name in fields))


def no_contraction(value: Array) -> Array:
    """The same finite values, in a form that ends any arithmetic the compiler may merge.

    XLA merges products by constants, and contracts a product and a sum to one operation with one
    rounding, for some shapes of the batch and not for others. A maximum in between forbids both
    (`lax.optimization_barrier` does not: it is gone before contraction).
    """
    return jnp.maximum(value, jnp.finfo(value.dtype).min)


def bounded(p_lower: Any, p_upper: Any) -> tuple[Array, Array]:
    """Both probabilities in float64, p_upper at most 1 - p_lower; inside `jax.enable_x64(True)`.

    1 - p_lower is exact where it matters, for p_lower in [1/2, 1] (Sterbenz).
    """
    p_lower = jnp.asarray(p_lower, jnp.float64)
    rest = 1 - p_lower
    return p_lower, rest if p_upper is None else jnp.minimum(
        jnp.asarray(p_upper, jnp.float64), rest
    )


def proved(radius: Array, p_lower: Array, p_upper: Array) -> Array:
    """The radius shrunk by `SLACK`, and 0 where the class does not lead; inside x64.

    Probabilities that no confidence bound returns (NaN, p_lower of 1, p_upper of 0) prove nothing.
    """
    leads = (p_lower > p_upper) & (p_lower < 1) & (p_upper > 0) & (radius > 0)
    return jnp.where(leads, radius * (1 - SLACK), 0.0)


def input_size(noise: Any, x: Any, p_lower: Array) -> int:
    """d, the number of coordinates of one input of x (..., *input)."""
    return math.prod(input_shape(noise, x, p_lower))


def input_shape(noise: Any, x: Any, p_lower: Array) -> tuple[int, ...]:
    """The shape of one input of x, whose leading axes are those of p_lower."""
    if x is None:
        raise ValueError(
            f"the radius of {type(noise).__name__} depends on the inputs; pass them, "
            "radius(p_lower, p_upper, x)"
        )
    return jnp.shape(x)[jnp.ndim(p_lower) :]


def require_scale(noise: Any, name: str, example: str) -> None:
    """Make a field a float; raise unless it is a positive number."""
    value = getattr(noise, name)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and float(value) > 0):
        raise ValueError(
            f"{name} must be a positive number, got {value!r}; it is in the units of the input, "
            f"e.g. {example} for pixels in [0, 1]"
        )
    object.__setattr__(noise, name, float(value))


def require_norm(noise: Any, known: tuple[float, ...]) -> None:
    """Raise unless the field `norm` is one that the noise proves a radius in."""
    if noise.norm not in known:
        raise ValueError(
            f"{type(noise).__name__} proves radii in the norms {', '.join(map(str, known))}, "
            f"got norm={noise.norm!r}"
        )
