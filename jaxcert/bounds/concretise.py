"""The least value of a linear function over an input set.

Over a box, min c x = sum_i c_i (m_i) - |c_i| r_i with midpoint m and radius r. Over a ball of norm
p, Hoelder's inequality: c (x - x0) >= -eps |c|_q with 1/p + 1/q = 1. Over a ball cut by a box, weak
duality: for every multiplier t >= 0 of the norm's constraint the separable minimum

    sum_i min { c_i d_i + t phi(d_i) : lo_i <= d_i <= hi_i } - t phi(eps),   d = x - x0,

with phi(d) = d^2 / 2 for L2 and |d| for L1, is a lower bound, whatever t; the best t is found by
bisection. t = 0 is the box alone, so the result is never worse than either.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.sets import Array, Box, InputSet, L1Ball, L2Ball, LinfBall, bounding_box, per_example

_STEPS = 40


def box_of(region: InputSet, outward: bool) -> Box:
    """The smallest box around a set; in a proof one that surely contains it."""
    box = bounding_box(region)
    if outward and not isinstance(region, Box):
        return rounding.widen(box, rounding.ARITHMETIC)
    return box


def around_centre(region: InputSet) -> tuple[InputSet, Array]:
    """A set that contains x - c for each x of the region, and c."""
    if isinstance(region, Box):
        centre = region.lower / 2 + region.upper / 2
        return _less(region, centre), centre
    valid = None if region.valid is None else _less(region.valid, region.x)
    return dataclasses.replace(region, x=jnp.zeros_like(region.x), valid=valid), region.x


def _less(box: Box, centre: Array) -> Box:
    moved = Box(box.lower - centre, box.upper - centre)
    return rounding.widen(moved, rounding.ARITHMETIC)


def least(region: InputSet, rows: Array, outward: bool) -> Array:
    """Lower bounds (r, b) of rows (r, b, *input) over each example's set."""
    box = box_of(region, outward)
    rows = rows.astype(box.lower.dtype)
    centre, radius = box.lower / 2 + box.upper / 2, box.upper / 2 - box.lower / 2
    axes = tuple(range(2, rows.ndim))
    n = rows[0, 0].size
    if outward:
        # Each entry's product errs by u, the sum by gamma_n: all of it joins the radius.
        radius = jnp.maximum(box.upper - centre, centre - box.lower)
        radius = rounding.inflate(radius + rounding.gamma(n + 8) * (jnp.abs(centre) + radius), n)
    over_box = jnp.sum(rows * centre - jnp.abs(rows) * radius, axes)
    if isinstance(region, Box | LinfBall):
        return over_box
    eps = jnp.asarray(region.eps, rows.dtype)
    size = _dual_norm(rows, region, axes) * eps
    at_centre = jnp.sum(rows * region.x, axes)
    if outward:
        error = rounding.gamma(n + 16) * (jnp.sum(jnp.abs(rows * region.x), axes) + size)
        size = size + rounding.inflate(error, n)
    over_ball = at_centre - size
    if region.valid is None:
        return jnp.maximum(over_ball, over_box)
    over_both = _least_over_cut(region, rows, box, outward)
    return jnp.fmax(jnp.maximum(over_ball, over_box), over_both)


def _dual_norm(rows: Array, region: InputSet, axes: tuple[int, ...]) -> Array:
    if isinstance(region, L1Ball):
        return jnp.max(jnp.abs(rows), axes)
    # In units of the largest entry, or squares of small ones would vanish.
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axes, keepdims=True))
    positive = unit != 0  # the root has no derivative at zero
    squares = jnp.sum(jnp.square(rows / jnp.where(positive, unit, 1.0)), axes)
    unit, positive = jnp.squeeze(unit, axes), jnp.squeeze(positive, axes)
    return unit * jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _least_over_cut(region: L2Ball | L1Ball, rows: Array, box: Box, outward: bool) -> Array:
    """Over the ball cut by its valid box, by the dual at a nearly best multiplier."""
    low, high = box.lower - region.x, box.upper - region.x
    axes = tuple(range(2, rows.ndim))
    eps = jnp.broadcast_to(per_example(region.eps, rows[0]), (rows.shape[1],) + (1,) * len(axes))
    quadratic = isinstance(region, L2Ball)

    def minimiser(t: Array) -> Array:
        """Of c d + t phi(d) over [low, high], entry by entry."""
        if quadratic:
            return jnp.clip(-rows / t, low, high)
        return jnp.where(rows > t, low, jnp.where(rows < -t, high, 0.0))

    def spent(d: Array) -> Array:
        return jnp.sum(jnp.square(d) / 2 if quadratic else jnp.abs(d), axes, keepdims=True)

    budget = jnp.square(eps) / 2 if quadratic else eps
    steepest = jnp.max(jnp.abs(rows), axes, keepdims=True)
    tiny = jnp.finfo(rows.dtype).tiny
    # Beyond `top` the minimiser is inside the ball: |c| / t <= eps, or t >= max |c_i|.
    norm = _dual_norm(rows, region, axes).reshape(steepest.shape)
    top = norm / jnp.maximum(eps, tiny) if quadratic else steepest
    top = jnp.clip(top, tiny, jnp.finfo(rows.dtype).max / 4)

    def halve(_, ends):
        a, b = ends
        t = a / 2 + b / 2
        outside = spent(minimiser(jnp.maximum(t, tiny))) > budget
        return jnp.where(outside, t, a), jnp.where(outside, b, t)

    _, t = jax.lax.fori_loop(0, _STEPS, halve, (jnp.zeros_like(top), top))
    t = jax.lax.stop_gradient(jnp.maximum(t, tiny))
    if not quadratic:  # the best t is the size of an entry, and moves with it
        near = t * (1 + 8 * float(jnp.finfo(rows.dtype).eps))
        sizes = jnp.where(jnp.abs(rows) <= near, jnp.abs(rows), 0.0)
        t = jnp.maximum(jnp.max(sizes, axes, keepdims=True), tiny)
    d = jax.lax.stop_gradient(minimiser(t)) if not quadratic else minimiser(t)
    value = rows * d + t * (jnp.square(d) / 2 if quadratic else jnp.abs(d))
    total = jnp.sum(value, axes) + jnp.sum(rows * region.x, axes) - jnp.squeeze(t * budget, axes)
    if not outward:
        return total
    # d is only nearly the minimiser, by some roundings e of |d|. Near the minimum the derivative
    # c + t d is itself of rounding size or d is at an end, so e costs at most e (|c| + t |d|) |d|.
    n = rows[0, 0].size
    reach = jnp.maximum(jnp.abs(low), jnp.abs(high))
    sizes = jnp.abs(rows) * (reach + jnp.abs(region.x)) + t * jnp.square(reach)
    if not quadratic:
        sizes = jnp.abs(rows) * (reach + jnp.abs(region.x)) + t * reach
    error = rounding.gamma(n + 64) * (jnp.sum(sizes, axes) + jnp.squeeze(t * budget, axes))
    return total - rounding.inflate(error, n)
