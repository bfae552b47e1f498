"""Projected gradient descent with momentum, on any set."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.sets import AnySet, Array, Box, LinfBall, Polytope, bounding_box, per_example, project

Objective: TypeAlias = Callable[[Array], Array]
"""points (p, *input) -> what to make small, (p,)."""


def uniform(key: Array, region: AnySet) -> Array:
    """One point of each set, spread over all of it (over its bounding box, then projected)."""
    box = bounding_box(region)
    unit = jax.random.uniform(key, jnp.shape(box.lower), box.lower.dtype)
    return project(region, box.lower + unit * (box.upper - box.lower))


def corner(region: AnySet, slope: Array) -> Array:
    """The point of each set where a linear function with this slope (p, *input) is least; for cut
    balls the one of the ball, for polytopes the one of the box, projected."""
    box = bounding_box(region)
    if isinstance(region, Box | LinfBall | Polytope):
        least = jnp.where(slope > 0, box.lower, box.upper)
        return project(region, least) if isinstance(region, Polytope) else least
    axes = tuple(range(1, slope.ndim))
    size = jnp.abs(slope)
    if region.norm == 1.0:
        largest = size == jnp.max(size, axes, keepdims=True)
        direction = jnp.where(largest, jnp.sign(slope), 0.0)
        direction = direction / jnp.maximum(jnp.sum(largest, axes, keepdims=True), 1)
    else:
        direction = slope / jnp.maximum(_norm(slope), jnp.finfo(slope.dtype).tiny)
    return project(region, region.x - per_example(region.eps, slope) * direction)


def descend(
    objective: Objective,
    region: AnySet,
    start: Array,
    *,
    steps: int,
    size: float = 0.25,
    decay: float = 0.92,
    momentum: float = 0.7,
) -> tuple[Array, Array]:
    """The best points found from p starting points, each in a set of its own.

    Every second point moves along the sign of its momentum (in Linf sets, boxes and polytopes), the
    others along the momentum itself: the former is better in many dimensions, the latter in few.

    Args:
      objective: what to make small.
      region: p sets.
      start: (p, *input).
      steps: how many.
      size: of the first step, in units of the set's extent.
      decay: of the size, from step to step.
      momentum: how much of the last direction stays.

    Returns:
      Points (p, *input) and the objective there (p,); NaN counts as infinite. Points of polytopes
      are in the box, but maybe outside of some inequalities: see `project`.
    """
    box = bounding_box(region)
    boxed = isinstance(region, Box | LinfBall | Polytope)
    extent = (box.upper - box.lower) if boxed else per_example(region.eps, start)
    axes = tuple(range(1, start.ndim))
    odd = per_example(jnp.arange(len(start)) % 2 == 1, start)

    def value(x: Array) -> Array:
        found = objective(x)
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def direction(m: Array) -> Array:
        if not boxed:
            return m / jnp.maximum(_norm(m), jnp.finfo(m.dtype).tiny)
        top = jnp.max(jnp.abs(m), axes, keepdims=True)
        return jnp.where(odd, jnp.sign(m), m / jnp.maximum(top, jnp.finfo(m.dtype).tiny))

    def step(t, carry):
        x, m, best, least = carry
        slope = jax.grad(lambda x: jnp.sum(objective(x)))(x)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0) * extent
        total = jnp.sum(jnp.abs(slope), axes, keepdims=True)
        m = momentum * m + slope / jnp.maximum(total, jnp.finfo(m.dtype).tiny)
        x = project(region, x - (size * decay**t) * extent * direction(m)).astype(x.dtype)
        now = value(x)
        better = now < least
        return x, m, jnp.where(per_example(better, x), x, best), jnp.where(better, now, least)

    carry = start, jnp.zeros_like(start), start, value(start)
    return jax.lax.fori_loop(0, steps, step, carry)[2:]


def _norm(m: Array) -> Array:
    axes = tuple(range(1, m.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(m), axes, keepdims=True))
