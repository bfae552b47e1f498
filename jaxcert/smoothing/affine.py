"""Models whose first layer is affine, which shared noise then passes once for a group of images."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.model import is_traced
from jaxcert.pytrees import pytree

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class AffineFirst:
    """The model rest(first(z)), of which `smoothing` applies `first` to noise and images apart.

    For an affine `first`, first(x + e) = first(x) + (first(e) - first(0)) over the reals, so that
    noise e shared by a group of images (`SmoothingPlan.group`) needs the first layer once. What is
    counted then is not the float program rest(first(x + e)), but one that adds in another order;
    the certificate is about real arithmetic anyway. Noise that is made to cover the float program
    (`GridGaussian`) is refused. Outside of such a plan it is the plain model.

    Attributes:
      first: an affine map (b, *input) -> (b, *hidden), a pytree like any model.
      rest: (b, *hidden) -> (b, k).

    Example:
      >>> from jaxcert import smoothing
      >>> first, rest = (lambda z: 2 * z + 1), (lambda h: jnp.concatenate([h, -h], axis=1))
      >>> plan = smoothing.SmoothingPlan(noise=smoothing.Gaussian(0.5), n=2000, group=2)
      >>> f, x = smoothing.AffineFirst(first, rest), jnp.array([[0.5], [1.0]])
      >>> print(smoothing.certify(jax.random.key(0), f, x, plan).prediction)
      [0 0]
    """

    first: Any
    rest: Any

    def __call__(self, z: Array) -> Array:
        """The logits."""
        return self.rest(self.first(z))

    def linear(self, noise: Array) -> Array:
        """first(e) - first(0) for noise e (c, *input)."""
        return self.first(noise) - self.first(jnp.zeros_like(noise[:1]))

    def check(self, z: Any) -> None:
        """Raise unless `first` is affine on batches of this shape and type.

        JAX transposes affine functions only, but takes a cast to integers for one, which numbers
        tell.
        """
        try:
            out = jax.eval_shape(self.first, z)
            jax.eval_shape(jax.linear_transpose(self.first, z), out)
            reason = None if self._doubles(z) else "it does not double what is doubled"
        except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
            reason = f"JAX cannot transpose it: {error}"
        if reason is not None:
            raise ValueError(
                "the first part of AffineFirst must be affine, such as a dense layer or a "
                f"convolution; {reason}"
            )

    def _doubles(self, z: Any) -> Array | bool:
        """Whether linear(2 e) = 2 linear(e) for one e; taken for granted where it is traced."""
        noise = jax.random.normal(jax.random.key(0), z.shape).astype(z.dtype)
        once, twice = self.linear(noise), self.linear(2 * noise)
        tolerance = 1e3 * jnp.finfo(once.dtype).eps * (1 + jnp.max(jnp.abs(once)))
        doubles = jnp.all(jnp.abs(twice - 2 * once) <= tolerance)
        return True if is_traced(doubles) else bool(doubles)
