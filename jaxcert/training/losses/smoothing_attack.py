"""Adversaries of smoothed models: L2 gradient ascent through noisy copies, for training.

They make examples to learn from. What they do not find proves nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import Model, is_traced, split
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, flat_norm, per_example
from jaxcert.training.losses.checks import checked
from jaxcert.training.losses.noisy import (
    draws,
    log_mean_softmax,
    of_label,
    stacked_logits,
    streams,
)

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Ascent:
    """How far and in how many steps an adversary goes: each along its gradient, of one L2 length.

    A pytree whose `steps` are static: a new `eps`, as of a schedule, compiles nothing.

    Attributes:
      eps: radius of the L2 ball around the start, in the units of the input; a scalar, or one per
        example (b,).
      steps: how many. They are unrolled, since XLA:CPU is slow at gradients of convolutions inside
        of loops: the time to compile grows with them.
      size: length of a step, like `eps`; None is 2 eps / steps. steps * size <= eps makes an ascent
        that is never projected.
      valid: a `Box` that points shall stay in, `Box(0.0, 1.0)` for images, or None.
    """

    eps: Any
    steps: int = dataclasses.field(default=10, metadata={"static": True})
    size: Any = None
    valid: Box | None = None


def ascend(
    objective: Callable[[Array], Array],
    start: Array,
    ascent: Ascent,
    settle: Callable[[Array], Array] = lambda z: z,
) -> Array:
    """Points (m, *input) with a larger objective (m,), within the ascent's ball around the start.

    Args:
      objective: (m, *input) -> (m,), rows independent.
      start: (m, *input).
      ascent: eps and size with one entry per row, or scalars.
      settle: what is done to the points after each step.

    Returns:
      Constants for gradients. A row whose gradient is 0 stays where it is.
    """
    start = jax.lax.stop_gradient(start)
    # Whatever weights the objective closes over are constants too: nothing of the ascent is kept
    # for a backward pass.
    climbed, weights = jax.closure_convert(objective, start)
    weights = jax.lax.stop_gradient(weights)
    slope = jax.grad(lambda z: jnp.sum(climbed(z, *weights)))
    eps = jnp.asarray(ascent.eps, start.dtype)
    size = 2 * eps / ascent.steps if ascent.size is None else jnp.asarray(ascent.size, start.dtype)
    z = start
    for _ in range(ascent.steps):
        gradient = slope(z)
        norm = per_example(flat_norm(gradient, 2), z)
        z = z + per_example(size, z) * jnp.where(
            norm > 0, gradient / jnp.where(norm > 0, norm, 1), 0
        )
        z = settle(_within(z, start, eps, ascent.valid))
    return jax.lax.stop_gradient(z)


def without_updates(f: Model) -> Model:
    """f, a module that keeps statistics included, as a function that leaves it as it is.

    An ascent calls the model within traces of its own, where a module of the caller's may not be
    changed; and running statistics are of what is trained on.
    """
    arrays, structure = split(f)
    return lambda z: structure.build(arrays)(z)


def _within(z: Array, start: Array, eps: Array, valid: Box | None) -> Array:
    """z moved into the box, then towards the start into the ball, and so not out of the box."""
    if valid is not None:
        z = jnp.clip(z, valid.lower, valid.upper)
    moved = z - start
    norm = flat_norm(moved, 2)
    shrink = jnp.where(norm > eps, eps / jnp.where(norm > eps, norm, 1), 1)
    return start + per_example(shrink, z) * moved


def smoothed_adversary(
    key: Array, f: Model, x: Any, y: Any, *, noise: Any, ascent: Ascent, n: int = 4
) -> Array:
    """Inputs near x that the soft smoothed model takes for y with less probability.

    SmoothAdv-PGD of Salman et al. (NeurIPS 2019): ascent on
    J(x') = -log 1/n sum_i softmax(f(x' + delta_i))_y with fixed draws delta_i, that is, on the loss
    of the average and not on the average of losses.

    Deviation: where the gradient is 0 the authors' code takes a random step, this one none; by
    logarithms, the gradient is not 0 already where a softmax rounds to 1.

    Args:
      key, f, x, y, noise, n: as for `smooth_adv`, which sees the same draws with the same key.
      ascent: an `Ascent`.

    Returns:
      x', of the shape of x, a constant for gradients.

    Raises:
      TypeError, ValueError: as `smooth_adv`.

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> f = lambda x: jnp.stack([x[:, 0], -x[:, 0]], axis=1)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
      >>> settings = {"noise": Gaussian(0.25), "ascent": Ascent(eps=0.5, steps=2)}
      >>> find = jax.jit(lambda key: smoothed_adversary(key, f, x, y, **settings))
      >>> print(find(jax.random.key(0)))
      [[0.5 0. ]
       [1.5 0. ]]
    """
    noise_key, _ = streams(key)
    delta = draws(noise_key, x, noise, n)
    return adversary_of(f, x, y, delta, ascent)


def adversary_of(f: Model, x: Any, y: Any, delta: Array, ascent: Ascent) -> Array:
    """`smoothed_adversary` for draws (n, b, *input) at hand."""
    require_ascent(ascent, x)
    f = without_updates(f)

    def objective(z: Array) -> Array:
        p = log_mean_softmax(stacked_logits(f, z + delta))
        return -of_label(*checked(p, y))

    return ascend(objective, jnp.asarray(x), ascent)


def require_ascent(ascent: Any, x: Any) -> None:
    """What is static or known of an ascent from x."""
    if not isinstance(ascent, Ascent):
        raise TypeError(
            f"ascent must be an Ascent, got {type(ascent).__name__}; "
            "type ascent=Ascent(eps=1.0, steps=10)"
        )
    if not isinstance(ascent.steps, int) or isinstance(ascent.steps, bool) or ascent.steps < 1:
        raise ValueError(f"ascent.steps must be a positive int, got {ascent.steps!r}")
    for name in ("eps", "size"):
        value = getattr(ascent, name)
        if name == "size" and value is None:
            continue
        if jnp.shape(value) not in ((), jnp.shape(x)[:1]):
            raise ValueError(
                f"ascent.{name} must be a scalar or one per example {jnp.shape(x)[:1]}, got shape "
                f"{jnp.shape(value)}"
            )
        if not is_traced(value) and not np.all((np.asarray(value) >= 0) & np.isfinite(value)):
            raise ValueError(f"ascent.{name} must be finite and 0 or more, got {value}")
    if ascent.valid is None:
        return
    if not isinstance(ascent.valid, Box):
        raise TypeError(
            f"ascent.valid must be a Box such as Box(0.0, 1.0), got {type(ascent.valid).__name__}"
        )
    if not is_traced(x, ascent.valid):
        inside = (ascent.valid.lower <= np.asarray(x)) & (np.asarray(x) <= ascent.valid.upper)
        if not np.all(inside):
            raise ValueError(
                f"x must lie in ascent.valid, but {math.prod(x.shape) - int(inside.sum())} entries "
                "do not; clip it first, or leave valid out"
            )
