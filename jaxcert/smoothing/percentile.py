"""Percentile smoothing: bounds on the median, or any percentile, of a model's outputs under noise.

For regression, boxes and whatever else comes as real numbers, each bounded on its own.
"""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from jaxcert.floats import ieee_float64, rounded_down, rounded_up
from jaxcert.model import Model, Structure, is_traced
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, Grid
from jaxcert.smoothing.arguments import checked
from jaxcert.smoothing.confidence import upper_tail
from jaxcert.smoothing.noise import GridGaussian
from jaxcert.smoothing.outputs import (
    confidence_of,
    keep,
    per_image,
    sigma_of,
    total_variation,
)
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import prepared, usable

Array: TypeAlias = jax.Array

SLACK = 2.0**-40


@pytree
@dataclasses.dataclass(frozen=True)
class PercentileBounds:
    """For every x' with |x' - x|_norm <= radius, lower <= h_p(x') <= upper in every coordinate.

    h_p(x') is the p-quantile of f(x' + noise); where the quantile is not unique, all are meant. All
    coordinates of an image hold together with its confidence.

    Attributes:
      value: (b, *out), the same quantile of the draws at x: an estimate of h_p(x), which lies
        within the bounds too.
      lower, upper: (b, *out), -inf and inf where nothing is proved.
      radius: (b,), the eps asked for.
      confidence: (b,), 1 - alpha.
      p: which quantile; static.
      norm: of the radius; static.
      within: where x' must lie, as the noise says; None for everywhere.
    """

    value: Array
    lower: Array
    upper: Array
    radius: Array
    confidence: Array
    p: float = dataclasses.field(metadata={"static": True})
    norm: float = dataclasses.field(metadata={"static": True})
    within: Box | Grid | None = None


def certify(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    eps: Any,
    *,
    p: float = 0.5,
    index: Any = None,
) -> PercentileBounds:
    """Bounds on the p-quantile of f(x' + noise) for all x' within eps of x.

    Median smoothing of Chiang, Curry, Abdelkader, Kumar, Dickerson and Goldstein (NeurIPS 2020),
    with order statistics whose levels are exact binomial tails, alpha / (2 m) per side of each of
    the m output coordinates. A NaN output counts as +inf for the upper and -inf for the lower
    bound. The outputs of all n draws of one image are kept: memory n m floats, three times over
    for sorting.

    Args:
      key: a scalar `jax.random.key`.
      f: the model, (b, *input) -> (b, *out) floats, in eval mode.
      x: floats (b, *input). An image that is not finite gets infinite bounds.
      plan: its noise, `Gaussian` or `GridGaussian`, n, alpha and chunk; n=10_000 is plenty.
      eps: a number >= 0 or one per image (b,), in the units of the input and the noise's norm.
      p: which quantile, 0 < p < 1; 0.5 is the median.
      index: ints (b,), the numbers of the images in their data set; default arange(b).

    Returns:
      `PercentileBounds`.

    Raises:
      TypeError, ValueError: for arguments of another kind, as `jaxcert.smoothing.certify` does.
      MixedRows, StatefulModel: where the draws would not be independent.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=2000)
      >>> double = lambda x: 2 * x  # its median is 2 x, so the exact bounds are 2 (x -+ eps)
      >>> bounds = certify(jax.random.key(0), double, jnp.ones((1, 1)), plan, 0.25)
      >>> print(1.2 < bounds.lower[0, 0] < 1.5, 2.5 < bounds.upper[0, 0] < 2.8)
      True True
    """
    x, index = checked(key, x, plan, index)
    sigma, v = sigma_of(plan, x, GridGaussian), total_variation(plan, x)
    if not 0 < p < 1:
        raise ValueError(f"p must lie in (0, 1), got {p}; type p=0.5 for the median")
    eps = ieee_float64(rounded_up_radius(eps, x.shape[0]))
    arrays, structure, out = prepared(f, x, plan)
    coordinates = max(1, math.prod(out))
    with jax.enable_x64(True):
        level = plan.alpha / (2 * coordinates)
        ranks = tuple(
            order_statistic(plan.n, needed(p, eps, sigma, v, side), level) for side in (-1, 1)
        )
    estimate = math.ceil(p * plan.n)
    value, lower, upper = _bounds(
        arrays, key, x, index, ranks, structure=structure, plan=plan, estimate=estimate
    )
    confidence = confidence_of(plan, index.shape)
    noise = plan.noise
    return PercentileBounds(value, lower, upper, eps, confidence, p, noise.norm, noise.within)


def rounded_up_radius(eps: Any, b: int) -> Array:
    """eps as an array (b,) in the default float type, not below what was asked for."""
    if not is_traced(eps) and not np.all((np.asarray(eps) >= 0) & np.isfinite(eps)):
        raise ValueError(f"eps must be 0 or more and finite, got {eps}; type eps=0.25")
    if jnp.shape(eps) not in ((), (b,)):
        raise ValueError(f"eps must be a number or one per image, ({b},), got {jnp.shape(eps)}")
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        eps = rounded_up(jnp.asarray(eps, jnp.float64), dtype)
    return jnp.broadcast_to(eps, (b,))


# Write P_x(A) for the probability that f(x + N) lies in A, N Gaussian. By the Neyman-Pearson lemma
# (Cohen, Rosenfeld and Kolter, ICML 2019), for |delta| <= eps
#
#   Phi^-1(P_x(A)) - eps / sigma <= Phi^-1(P_{x + delta}(A)) <= Phi^-1(P_x(A)) + eps / sigma.   (1)
#
# A number h is a p-quantile at x + delta if P_{x + delta}[f < h] <= p <= P_{x + delta}[f <= h]. Let
# p_up = Phi(Phi^-1(p) + eps / sigma). If P_x[f <= u] > p_up, then P_{x + delta}[f <= u] > p by (1),
# so h <= u: any h > u would have P_{x + delta}[f < h] > p. The lower bound is the upper one of -f
# at 1 - p, for which Phi^-1(1 - p) = -Phi^-1(p).
def shifted(quantile: Array, eps: Any, sigma: float) -> Array:
    """Phi(quantile + eps / sigma), rounded up; inside `jax.enable_x64(True)`.

    The most that an event of probability Phi(quantile) can have under the noise eps away.
    """
    eps = jnp.asarray(eps, jnp.float64)
    moved = quantile + eps / sigma
    # ndtr and ndtri are good to a few units of 2^-53, relatively; what that makes of the argument
    # is covered by moving it, what is lost in the value by scaling that.
    moved = moved + SLACK * (1 + jnp.abs(quantile) + eps / sigma)
    return jnp.minimum(ndtr(moved) * (1 + SLACK), 1.0)


# Where the law that is drawn from is within v of the Gaussian one in total variation, at x and at
# x + delta: P_{x + delta}[f <= u] > p follows from more than p + v under the Gaussian there, that
# from more than Phi(Phi^-1(p + v) + eps / sigma) under the Gaussian at x, and that from v more as
# drawn. (A Gaussian rounded to the grid is a Gaussian that the model rounds: see `GridGaussian`.)
def needed(p: Any, eps: Any, sigma: float, v: float, side: int = 1) -> Array:
    """A probability at x with which an event has more than p (for side = -1, 1 - p) within eps.

    Rounded up, float64; inside `jax.enable_x64(True)`.
    """
    quantile = side * ndtri(jnp.clip(jnp.asarray(p, jnp.float64) + side * v, 0, 1))
    return jnp.minimum((shifted(quantile, eps, sigma) + v) * (1 + SLACK), 1.0)


# Let Y_(1) <= ... <= Y_(n) be sorted draws with distribution function F. F(Y_(q)) <= p requires q
# draws with F(Y_i) <= p, each of which has probability at most p, so that it happens with
# probability P[Bin(n, p) >= q] at most.
def order_statistic(n: int, p: Array, level: Any) -> Array:
    """The least q for which P[Y <= Y_(q)] > p with probability 1 - level; n + 1 if there is none.

    Y_(q) is the q-th smallest of n draws of Y, and level at most 1/2.

    Args:
      n: number of draws.
      p: float64 (...).
      level: the probability with which Y_(q) may be too small.

    Returns:
      int32 (...), in 1, ..., n + 1.
    """
    with jax.enable_x64(True):
        arguments = (jnp.asarray(value, jnp.float64) for value in (n, p, level))
        return _least_rank(*arguments).astype(jnp.int32)


@jax.jit
def _least_rank(n: Array, p: Array, level: Array) -> Array:
    """By bisection, as the tail falls with q; only a q whose own tail is small is returned."""
    with jax.enable_x64(True):

        def halve(_, ends):
            low, high = ends
            middle = jnp.floor((low + high) / 2)
            enough = (upper_tail(middle, n, p) <= level) & (middle > low)
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        low = jnp.zeros(p.shape, jnp.float64)
        return jax.lax.fori_loop(0, 32, halve, (low, low + n + 1))[1]


@functools.partial(jax.jit, static_argnames=("structure", "plan", "estimate"))
def _bounds(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    ranks: tuple[Array, Array],
    *,
    structure: Structure,
    plan: SmoothingPlan,
    estimate: int,
) -> tuple[Array, Array, Array]:
    """Estimate, lower and upper bound, each (b, *out)."""

    def f(z):  # rebuilt inside of the loop, so that a module may update its own state there
        return structure.build(arrays)(z)

    def one(image_key, pixels, below, above):
        draws = keep(f, image_key, pixels, plan, n=plan.n)
        ascending, descending = (sorted_draws(side * draws) for side in (1, -1))
        value = ascending[estimate - 1]
        return value, -ranked(descending, below), ranked(ascending, above)

    value, lower, upper = per_image(one, key, index, plan, x, *ranks)
    good = usable(structure, arrays, x, plan.noise, plan.rows).reshape(-1, *(1,) * (value.ndim - 1))
    return (
        jnp.where(good, value, jnp.nan),
        jnp.where(good, lower, -jnp.inf),
        jnp.where(good, upper, jnp.inf),
    )


def sorted_draws(draws: Array) -> Array:
    """Draws (n, *out) in ascending order, NaN as inf."""
    return jnp.sort(jnp.where(jnp.isnan(draws), jnp.inf, draws), axis=0)


def ranked(ascending: Array, rank: Array) -> Array:
    """The draw of a rank 1, ..., n; inf for n + 1."""
    n = ascending.shape[0]
    return jnp.where(rank <= n, ascending[jnp.minimum(rank, n) - 1], jnp.inf)


def iou_lower(bounds: PercentileBounds, boxes: Any) -> Array:
    """At least the intersection over union of given boxes with the smoothed boxes, within radius.

    Every box between the bounds contains the smallest one, which has the upper bounds of the left
    and top edges and the lower bounds of the right and bottom edges, and lies in the largest one.
    So its intersection with a given box t is at least that of the smallest one, and its union with
    t at most that of the largest one. (Not the worst case itself, which one box need not attain in
    both.)

    Args:
      bounds: of a model whose outputs are boxes (b, ..., 4): left, top, right, bottom.
      boxes: floats (b, ..., 4), such as the true boxes.

    Returns:
      float (b, ...) in [0, 1], rounded down; 0 where nothing is proved.
    """
    if jnp.shape(boxes) != bounds.lower.shape or jnp.shape(boxes)[-1:] != (4,):
        raise ValueError(
            f"boxes and bounds must have one shape (b, ..., 4), got {jnp.shape(boxes)} and "
            f"{bounds.lower.shape}"
        )
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        lower, upper, given = (
            jnp.asarray(value).astype(jnp.float64) for value in (bounds.lower, bounds.upper, boxes)
        )
        smallest = (upper[..., 0], upper[..., 1], lower[..., 2], lower[..., 3])
        largest = (lower[..., 0], lower[..., 1], upper[..., 2], upper[..., 3])
        given = tuple(given[..., i] for i in range(4))
        least = _area(_common(smallest, given))
        most = _area(largest) + _area(given) - _area(_common(largest, given))
        # Areas of float32 edges are exact to 2^-52 or so; the difference loses what cancels.
        sizes = _area(largest) + _area(given)
        ratio = least * (1 - SLACK) / (most + SLACK * sizes)
        proved = jnp.isfinite(ratio) & (ratio > 0)
        return rounded_down(jnp.where(proved, jnp.minimum(ratio, 1.0), 0.0), dtype)


def _common(first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
    left, top = (jnp.maximum(first[i], second[i]) for i in (0, 1))
    right, bottom = (jnp.minimum(first[i], second[i]) for i in (2, 3))
    return left, top, right, bottom


def _area(box: tuple[Array, ...]) -> Array:
    left, top, right, bottom = box
    return jnp.maximum(right - left, 0.0) * jnp.maximum(bottom - top, 0.0)
