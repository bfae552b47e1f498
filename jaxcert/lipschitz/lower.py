"""Lower bounds on Lipschitz constants: two points between which the model does change that fast.

No certificate comes from here. A lower bound above a proved constant would show a bug in the proof.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.model import Model, Structure, split
from jaxcert.sets import Array


def lower_bound(key: Array, f: Model, x: Any, *, norm: float = 2, steps: int = 100) -> Array:
    """The largest |f(x') - f(x)| / |x' - x| that gradient ascent over pairs of points finds.

    Args:
      key: from `jax.random.key`; each pair starts a small random step apart.
      f: the model, (b, *input) -> (b, *out).
      x: float (b, *input), where the b pairs start: real inputs, random ones, or both.
      norm: 2 or `jnp.inf`, of inputs and outputs.
      steps: of ascent, in the direction of the gradient, over both points.

    Returns:
      A scalar, in x's float type: the Lipschitz constant of f is at least this large, up to the
      rounding of f's own forward pass, which limits how close the points may come.
    """
    if norm not in (2, jnp.inf):
        raise ValueError(f"lower_bound is for norm=2 or norm=jnp.inf, got {norm!r}")
    arrays, structure = split(f, x)
    return jnp.max(_ascend(key, arrays, structure, jnp.asarray(x), norm, steps))


@functools.partial(jax.jit, static_argnums=(2, 4, 5))
def _ascend(
    key: Array, arrays: list[Any], structure: Structure, x: Array, norm: float, steps: int
) -> Array:
    f = structure.build(arrays)
    axes = tuple(range(1, x.ndim))
    # Far enough for differences of outputs to hold half of the float type's digits.
    apart = float(jnp.finfo(x.dtype).eps) ** 0.25 * (1 + jnp.max(jnp.abs(x)))

    def size(values):
        flat = values.reshape(len(values), -1)
        return jnp.linalg.norm(flat, ord=norm, axis=1)

    def ratio(pair):
        start, step = pair
        return size(f(start + step) - f(start)) / jnp.maximum(size(step), 1e-30)

    def climb(carry, _):
        pair, best = carry
        gradients = jax.grad(lambda p: jnp.sum(ratio(p)))(pair)
        reach = size(pair[1]).reshape(-1, *(1,) * (x.ndim - 1))
        point, step = (v + 0.5 * reach * steepest(g) for v, g in zip(pair, gradients, strict=True))
        # Never closer than at the start: a ratio of rounding errors is no bound.
        length = size(step).reshape(reach.shape)
        moved = point, step * jnp.maximum(1, apart / jnp.maximum(length, 1e-30))
        return (moved, jnp.fmax(best, ratio(moved))), None

    def steepest(gradient):
        """The direction of length 1 that the gradient points to: its sign in Linf."""
        if norm == jnp.inf:
            return jnp.sign(gradient)
        return gradient / jnp.maximum(jnp.sqrt(jnp.sum(gradient**2, axes, keepdims=True)), 1e-30)

    start = (x, apart * steepest(jax.random.normal(key, x.shape, x.dtype)))
    (_, best), _ = jax.lax.scan(climb, (start, ratio(start)), length=steps)
    return best
