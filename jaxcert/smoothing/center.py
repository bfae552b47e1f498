"""Center smoothing: outputs in a metric space, and how far they can move.

The smoothed model g returns, of a few sampled outputs, the one closest to most of the others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, Grid
from jaxcert.smoothing.arguments import checked
from jaxcert.smoothing.confidence import clopper_pearson_lower
from jaxcert.smoothing.noise import GridGaussian
from jaxcert.smoothing.outputs import (
    confidence_of,
    keep,
    per_image,
    sigma_of,
    total_variation,
)
from jaxcert.smoothing.percentile import (
    SLACK,
    needed,
    order_statistic,
    ranked,
    rounded_up_radius,
    sorted_draws,
)
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import prepared, usable

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class CenterCertificate:
    """For every x' with |x' - x|_norm <= radius, d(center, g(x')) <= change.

    g(x') is what `predict` returns at x' with some key; for every single x' the statement holds
    with the confidence given, over the draws of both runs.

    Attributes:
      center: (b, *out), g(x), which is what `predict` returns with the same key.
      change: (b,), in the units of the distance; inf where nothing is proved.
      radius: (b,), the eps asked for.
      confidence: (b,), 1 - alpha.
      norm: of the radius; static.
      within: where x' must lie, as the noise says; None for everywhere.
    """

    center: Array
    change: Array
    radius: Array
    confidence: Array
    norm: float = dataclasses.field(metadata={"static": True})
    within: Box | Grid | None = None


@dataclasses.dataclass(frozen=True)
class OutputMetric:
    """A distance of outputs, and how far it is from a metric; static.

    Attributes:
      distance: a traceable d(a, b) of two outputs (*out), symmetric and not negative; NaN means
        infinitely far.
      triangle: the least constant with d(a, c) <= triangle (d(a, b) + d(b, c)): 1 for a metric, 2
        for a squared Euclidean distance. The statements are about d as it is computed, so a
        constant a little larger accounts for its rounding.
      candidates: how many of the n0 outputs may become the centre; memory is candidates + n0
        floats per image and time candidates n0 distances.
    """

    distance: Callable[[Array, Array], Array]
    triangle: float = 1.0
    candidates: int = 100

    def __post_init__(self):
        if not callable(self.distance):
            raise TypeError(f"distance must be a function d(a, b), got {self.distance!r}")
        if not 1 <= self.triangle < math.inf:
            raise ValueError(f"triangle must be at least 1, got {self.triangle}")
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"candidates must be a positive int, got {self.candidates!r}")


def euclidean(a: Array, b: Array) -> Array:
    """The L2 distance of two outputs."""
    return jnp.sqrt(jnp.sum((a - b) ** 2))


EUCLIDEAN = OutputMetric(euclidean)


def certify(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    eps: Any,
    *,
    metric: OutputMetric = EUCLIDEAN,
    index: Any = None,
) -> CenterCertificate:
    """How far the smoothed output g can move while the input stays within eps of x.

    Center smoothing of Kumar and Goldstein (NeurIPS 2021): plan.n0 draws choose the centre, plan.n
    fresh ones bound the radius R of the ball around it that holds most outputs, and the change is
    triangle (1 + 2 triangle) R, 3 R for a metric. Levels are exact binomial tails and R is an order
    statistic; no draw is needed to see whether the centre is a good one (the proof says why). The
    outputs of the n0 draws of one image are kept, and n distances.

    Args:
      key: a scalar `jax.random.key`.
      f: the model, (b, *input) -> (b, *out) floats, in eval mode.
      x: floats (b, *input). For an image that is not finite nothing is proved.
      plan: its noise, `Gaussian` or `GridGaussian`, n0, n, alpha and chunk. The more n0, the closer
        to 1/2 is the mass that the ball must hold; n0=1000 is a good choice.
      eps: a number >= 0 or one per image (b,), in the units of the input and the noise's norm.
      metric: the distance of outputs.
      index: ints (b,), the numbers of the images in their data set; default arange(b).

    Returns:
      `CenterCertificate`.

    Raises:
      TypeError, ValueError: for arguments of another kind, as `jaxcert.smoothing.certify` does;
        for an n0 or a number of candidates that is too small for alpha.
      MixedRows, StatefulModel: where the draws would not be independent.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan
      >>> plan = SmoothingPlan(noise=Gaussian(0.1), n0=200, n=2000)
      >>> certificate = certify(jax.random.key(0), jnp.tanh, jnp.zeros((1, 2)), plan, 0.05)
      >>> print(0.05 < certificate.change[0] < 1)
      True
    """
    x, index = checked(key, x, plan, index)
    sigma, v = sigma_of(plan, x, GridGaussian), total_variation(plan, x)
    if not isinstance(metric, OutputMetric):
        raise TypeError(f"metric must be an OutputMetric, got {metric!r}; type OutputMetric(...)")
    eps = ieee_float64(rounded_up_radius(eps, x.shape[0]))
    arrays, structure, _ = prepared(f, x, plan)
    with jax.enable_x64(True):
        mass = needed(majority(plan, metric), eps, sigma, v)
        rank = order_statistic(plan.n, mass, plan.alpha / 2)
    center, ball = _ball(arrays, key, x, index, rank, structure=structure, plan=plan, metric=metric)
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        factor = metric.triangle * (1 + 2 * metric.triangle) * (1 + SLACK)
        change = rounded_up(ball.astype(jnp.float64) * factor, dtype)
    confidence = confidence_of(plan, index.shape)
    noise = plan.noise
    return CenterCertificate(center, change, eps, confidence, noise.norm, noise.within)


def predict(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    metric: OutputMetric = EUCLIDEAN,
    index: Any = None,
) -> Array:
    """The smoothed output g(x), (b, *out), which a `certify` within reach of x bounds.

    SMOOTH of Kumar and Goldstein (NeurIPS 2021) without its abstention. Arguments and errors as for
    `certify`, whose centre it returns for the same key; NaN for an image that is not finite.
    """
    x, index = checked(key, x, plan, index)
    majority(plan, metric)
    arrays, structure, _ = prepared(f, x, plan)
    return _centers(arrays, key, x, index, structure=structure, plan=plan, metric=metric)


# Notation: n = n0 draws at x' choose its centre, h = floor(n / 2) + 1 of them are a majority, t is
# the triangle constant, and B(c, R) is the ball of outputs z with d(c, z) <= R.
#
# At x. Whatever c is, R is an order statistic of fresh distances d(c, f(x + N)): with probability
# 1 - alpha / 2, B(c, R) has a probability above Phi(Phi^-1(q) + eps / sigma) under f(x + N). By
# the Neyman-Pearson lemma it then has a probability above q under f(x' + N), |x' - x| <= eps.
#
# At x'. With q of `majority`, with probability 1 - alpha / 2 the ball holds h of the n outputs z_i
# and one of the candidates, z_j. Every z_i in the ball has d(z_j, z_i) <= t (R + R), so the least
# radius r' around a candidate that takes in h outputs is at most 2 t R. The centre c' attains it.
# Two majorities share an output y: d(c, c') <= t (d(c, y) + d(y, c')) <= t (R + 2 t R).
#
# The published algorithm also abstains where its centre is not good enough, because it compares
# masses of balls and not the draws themselves; here nothing depends on that.
def majority(plan: SmoothingPlan, metric: OutputMetric) -> Array:
    """A mass q, float64, with which a ball holds h outputs and a candidate, but for alpha / 2."""
    n, half = plan.n0, plan.n0 // 2 + 1
    # No candidate in the ball: (1 - q)^m at most, q > 1/2; all outputs are candidates for m >= n.
    missed = 0.0 if metric.candidates >= n else 2.0**-metric.candidates
    if missed > plan.alpha / 4:
        raise ValueError(
            f"candidates={metric.candidates} are too few at alpha={plan.alpha}; take candidates >= "
            f"{math.ceil(math.log2(4 / plan.alpha))}"
        )
    # Fewer than h in the ball: n - h + 1 or more outside, where Bin(n, 1 - q) has this tail.
    level = (plan.alpha / 2 - missed) * (1 - SLACK)
    with jax.enable_x64(True):
        outside = clopper_pearson_lower(n - half + 1, n, level)
        return 1 - outside * (1 - SLACK)


@functools.partial(jax.jit, static_argnames=("structure", "plan", "metric"))
def _ball(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    rank: Array,
    *,
    structure: Structure,
    plan: SmoothingPlan,
    metric: OutputMetric,
) -> tuple[Array, Array]:
    """The centres (b, *out) and the radii R (b,)."""

    def f(z):  # rebuilt inside of the loop, so that a module may update its own state there
        return structure.build(arrays)(z)

    def one(image_key, pixels, center, rank):
        distances = keep(
            lambda z: _distances(metric, center, f(z)), image_key, pixels, plan, n=plan.n
        )
        return ranked(sorted_draws(distances), rank)

    centers = _centers(arrays, key, x, index, structure=structure, plan=plan, metric=metric)
    radii = per_image(one, key, index, plan, x, centers, rank)
    return centers, jnp.where(usable(structure, arrays, x, plan.noise, plan.rows), radii, jnp.inf)


@functools.partial(jax.jit, static_argnames=("structure", "plan", "metric"))
def _centers(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    *,
    structure: Structure,
    plan: SmoothingPlan,
    metric: OutputMetric,
) -> Array:
    """Of the first outputs, the one whose ball of a majority of all outputs is the smallest."""

    def f(z):
        return structure.build(arrays)(z)

    def one(image_key, pixels):
        outputs = keep(f, image_key, pixels, plan, n=plan.n0, selection=True)
        candidates = outputs[: metric.candidates]

        def reach(candidate):
            return sorted_draws(_distances(metric, candidate, outputs))[plan.n0 // 2]

        return candidates[jnp.argmin(jax.lax.map(reach, candidates))]

    centers = per_image(one, key, index, plan, x)
    good = usable(structure, arrays, x, plan.noise, plan.rows).reshape(
        -1, *(1,) * (centers.ndim - 1)
    )
    return jnp.where(good, centers, jnp.nan)


def _distances(metric: OutputMetric, center: Array, outputs: Array) -> Array:
    """From one output to each of (n, *out): (n,)."""
    return jax.vmap(lambda output: metric.distance(center, output))(outputs)
