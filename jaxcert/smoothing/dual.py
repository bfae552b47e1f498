"""Dual smoothing: two models, each of which sees one half of the pixels under noise, vote together.

In half the dimensions noise of one size hides less of an image than in all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from jaxcert.certificate import ABSTAIN, Certificate, issue, predicted_class
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.smoothing.arguments import checked
from jaxcert.smoothing.certify import confidence
from jaxcert.smoothing.confidence import clopper_pearson_lower
from jaxcert.smoothing.outputs import per_image, sigma_of, tally
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import prepared, usable

Array: TypeAlias = jax.Array
Halving: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

SLACK = 2.0**-48


def checkerboard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a chessboard's two colours, (h, w, ...) -> two of (h, w / 2, ...), w even."""
    odd = np.arange(x.shape[0]) % 2
    column = np.arange(0, x.shape[1] - 1, 2)[None] + odd[:, None]
    row = np.arange(x.shape[0])[:, None]
    other = np.arange(0, x.shape[1] - 1, 2)[None] + (1 - odd)[:, None]
    return x[row, column], x[row, other]


@pytree
@dataclasses.dataclass(frozen=True)
class Halves:
    """A model of whole images, whose logits (b, 2, k) are those of two models of half images each.

    Attributes:
      left, right: models (b, *half) -> (b, k).
      halving: takes an image (*input) as a NumPy array apart, into two arrays of distinct entries.
    """

    left: Model
    right: Model
    halving: Halving = dataclasses.field(default=checkerboard, metadata={"static": True})

    def __call__(self, z: Array) -> Array:
        """The logits of both, (b, 2, k)."""
        flat = z.reshape(z.shape[0], -1)
        halves = (
            jnp.take(flat, places.ravel(), axis=1).reshape(-1, *places.shape)
            for places in disjoint(self.halving, z.shape[1:])
        )
        return jnp.stack([f(z) for f, z in zip((self.left, self.right), halves, strict=True)], 1)


def disjoint(halving: Halving, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of each half lie in the flat image; raises if one lies in both."""
    places = tuple(np.asarray(part) for part in halving(np.arange(math.prod(shape)).reshape(shape)))
    everything = np.concatenate([part.ravel() for part in places])
    if len(places) != 2 or len(np.unique(everything)) != everything.size:
        raise ValueError(
            "halving must take an image apart into two arrays that share no entry, each entry "
            f"once; on images {shape} it gives {[part.shape for part in places]}"
        )
    return places


def certify(
    key: Array, halves: Halves, x: Any, plan: SmoothingPlan, *, index: Any = None
) -> Certificate:
    """The radius within which the two smoothed half models together predict what they do at x.

    The certified function is g(x) = argmax_c (g_l(x)_c + g_r(x)_c), where g_l(x)_c is the
    probability that the left model predicts c on its half of x + noise. Dual randomized smoothing
    of Xia, Yu, Jiang and Ding (ICLR 2024): plan.n0 draws select the class by the votes of both,
    plan.n fresh ones bound its two probabilities at level alpha / 2 each, and
    R = sigma (Phi^-1(p_l) + Phi^-1(p_r)) / sqrt(2).

    Args:
      key: a scalar `jax.random.key`.
      halves: `Halves(left, right)`; one model for both, `Halves(f, f)`, is a pair too.
      x: floats (b, *input). An image that is not finite gets `ABSTAIN`.
      plan: a `SmoothingPlan` with `Gaussian` noise.
      index: ints (b,), the numbers of the images in their data set; default arange(b).

    Returns:
      A `Certificate` about g with the noise's norm and confidence 1 - alpha.

    Raises:
      TypeError, ValueError: for arguments of another kind, as `jaxcert.smoothing.certify` does.
      MixedRows, StatefulModel: where the votes would not be independent.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=2000)
      >>> sign = lambda half: jnp.stack([half.sum((1, 2)), -half.sum((1, 2))], axis=1)
      >>> x = jnp.ones((1, 1, 2))  # two pixels, one for each; the exact radius is sqrt(2)
      >>> certificate = certify(jax.random.key(0), Halves(sign, sign), x, plan)
      >>> print(certificate.prediction, 1.1 < certificate.radius[0] < 1.4142)
      [0] True
    """
    if not isinstance(halves, Halves):
        raise TypeError(f"type Halves(left, right) for the models, got {type(halves).__name__}")
    x, index = checked(key, x, plan, index)
    sigma = sigma_of(plan, x)
    arrays, structure, out = prepared(halves, x, plan)
    if len(out) != 2 or out[1] < 2:
        raise ValueError(f"both models must return logits (b, k) with k >= 2, got (b, *{out[1:]})")
    top, votes = _votes(arrays, key, x, index, structure=structure, plan=plan)
    votes = ieee_float64(votes)
    with jax.enable_x64(True):
        p_left, p_right = (
            clopper_pearson_lower(votes[:, half], plan.n, plan.alpha / 2) for half in (0, 1)
        )
        radius = dual_radius(p_left, p_right, sigma)
        prediction = jnp.where(radius > 0, top, ABSTAIN)
    return issue(prediction, radius, norm=plan.noise.norm, confidence=confidence(plan.alpha))


# Write x = (x_l, x_r) and delta = (delta_l, delta_r): the halves share no entry, so that
# |delta|^2 = a^2 + b^2 with a = |delta_l|, b = |delta_r|. Each half model is smoothed by Gaussian
# noise in its own space, so by the Neyman-Pearson lemma (Cohen, Rosenfeld and Kolter, ICML 2019)
#
#   g_l(x + delta)_A + g_r(x + delta)_A >= Phi(u - a / sigma) + Phi(v - b / sigma),
#
# u = Phi^-1(p_l), v = Phi^-1(p_r). All classes together have at most 2, so A leads all others if
# this exceeds 1. As 1 - Phi(t) = Phi(-t), it does if and only if u - a / sigma > -(v - b / sigma),
# that is a + b < sigma (u + v). The most that a + b can be is sqrt(2) |delta|, where a = b. So A
# leads while |delta| < sigma (u + v) / sqrt(2), and half-spaces attain it. The half models need not
# agree: u may be negative. (The square root of the sum of squared radii of both, sigma
# sqrt(u^2 + v^2), exceeds this unless u = v.)
def dual_radius(p_left: Array, p_right: Array, sigma: float) -> Array:
    """sigma (Phi^-1(p_l) + Phi^-1(p_r)) / sqrt(2), rounded down; 0 where nothing is proved.

    Args:
      p_left, p_right: float64 (...), lower bounds on the probability of the class in both halves.
      sigma: standard deviation of the noise, not above the true one.

    Returns:
      float64 (...). Only meaningful inside `jax.enable_x64(True)`.
    """
    with jax.enable_x64(True):
        u, v = (ndtri(jnp.asarray(p, jnp.float64)) for p in (p_left, p_right))
        # ndtri is good to 4e-16 (measured, see `Gaussian.radius`); the sum loses what cancels.
        least = u + v - SLACK * (1 + jnp.abs(u) + jnp.abs(v))
        radius = sigma / math.sqrt(2) * (1 - SLACK) * least
        return jnp.where(jnp.isfinite(radius) & (radius > 0), radius, 0.0)


@functools.partial(jax.jit, static_argnames=("structure", "plan"))
def _votes(
    arrays: list, key: Array, x: Array, index: Array, *, structure: Structure, plan: SmoothingPlan
) -> tuple[Array, Array]:
    """The class selected (b,), and its votes from both halves (b, 2)."""

    def classes(z):
        logits = structure.build(arrays)(z)
        return predicted_class(logits)[..., None] == jnp.arange(logits.shape[-1])

    def one(image_key, pixels):
        selection = tally(classes, image_key, pixels, plan, n=plan.n0, selection=True)
        estimation = tally(classes, image_key, pixels, plan, n=plan.n)
        top = jnp.argmax(jnp.sum(selection, axis=0))
        return top, estimation[:, top]

    top, votes = per_image(one, key, index, plan, x)
    return top, jnp.where(usable(structure, arrays, x, plan.noise, plan.rows)[:, None], votes, 0)
