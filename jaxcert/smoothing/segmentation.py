"""Segmentation: which pixels keep their class, with the errors of many tests at once counted."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.certificate import ABSTAIN, predicted_class
from jaxcert.floats import ieee_float64, rounded_down
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, Grid
from jaxcert.smoothing.arguments import checked
from jaxcert.smoothing.confidence import upper_tail
from jaxcert.smoothing.outputs import (
    confidence_of,
    per_image,
    tally,
)
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import prepared, usable

Array: TypeAlias = jax.Array

SLACK = 2.0**-48


@pytree
@dataclasses.dataclass(frozen=True)
class SegmentationCertificate:
    """For every x' with |x' - x|_norm <= radius, g(x') has the classes of `prediction`.

    That is, at every pixel that is not `ABSTAIN`, but for at most `errors` of them per image, all
    together with the confidence given. g(x') is at each pixel the class that f most likely returns
    there on x' + noise.

    Attributes:
      prediction: int32 (b, *pixels), or `ABSTAIN`.
      radius: (b,), one for all pixels, rounded down.
      confidence: (b,), 1 - alpha.
      errors: how many pixels may be wrong; static.
      norm: of the radius; static.
      within: where x' must lie, as the noise says; None for everywhere.
    """

    prediction: Array
    radius: Array
    confidence: Array
    errors: int = dataclasses.field(metadata={"static": True})
    norm: Any = dataclasses.field(metadata={"static": True})
    within: Box | Grid | None = None


def certify(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    tau: float = 0.75,
    errors: int = 0,
    index: Any = None,
) -> SegmentationCertificate:
    """The classes of the pixels whose most likely class has a probability above tau.

    SegCertify of Fischer, Baader and Vechev (ICML 2021): plan.n0 draws select the class of every
    pixel, a binomial test with plan.n fresh ones asks whether its probability exceeds tau, and the
    p-values are corrected by Holm's step-down procedure (or, for errors > 0, by that of Lehmann and
    Romano). The radius is that of tau, sigma Phi^-1(tau) for Gaussian noise. Memory next to one
    chunk's logits: two ints per pixel and class.

    Args:
      key: a scalar `jax.random.key`.
      f: the model, (b, *input) -> (b, *pixels, k) logits, in eval mode.
      x: floats (b, *input). An image that is not finite gets `ABSTAIN` everywhere.
      plan: a `SmoothingPlan`, any noise; its runner_up plays no part.
      tau: in [1/2, 1). A larger one has a larger radius and more abstentions.
      errors: how many wrong pixels per image are tolerated, for fewer abstentions.
      index: ints (b,), the numbers of the images in their data set; default arange(b).

    Returns:
      `SegmentationCertificate`.

    Raises:
      TypeError, ValueError: for arguments of another kind, as `jaxcert.smoothing.certify` does.
      MixedRows, StatefulModel: where the votes would not be independent.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=500)
      >>> signs = lambda x: jnp.stack([x, -x], axis=-1)  # two classes for each of three pixels
      >>> x = jnp.array([[2.0, 0.1, -2.0]])
      >>> certify(jax.random.key(0), signs, x, plan).prediction.tolist()
      [[0, -1, 1]]
    """
    x, index = checked(key, x, plan, index)
    if not 0.5 <= tau < 1:
        raise ValueError(f"tau must lie in [1/2, 1), got {tau}; type tau=0.75")
    if not isinstance(errors, int) or errors < 0:
        raise ValueError(f"errors must be a whole number of pixels, got {errors!r}; type errors=0")
    if tau**plan.n > plan.alpha * (errors + 1):
        needed = math.ceil(math.log(plan.alpha) / math.log(tau))
        raise ValueError(
            f"n={plan.n} draws cannot tell a probability from tau={tau} at alpha={plan.alpha}; "
            f"take n >= {needed}, and more for many pixels"
        )
    arrays, structure, out = prepared(f, x, plan)
    if len(out) < 2 or out[-1] < 2:
        raise ValueError(
            f"the model must return logits (b, *pixels, k) with k >= 2 classes last, got (b, "
            f"{', '.join(map(str, out))}); for one class per image use jaxcert.smoothing.certify"
        )
    top, votes = _votes(arrays, key, x, index, structure=structure, plan=plan)
    top, votes, x = ieee_float64((top, votes, x))
    prediction = _decided(top, votes, plan=plan, tau=tau, errors=errors)
    dtype, noise = jnp.result_type(float), plan.noise
    with jax.enable_x64(True):
        radius = noise.radius(jnp.full(index.shape, tau, jnp.float64), None, x)
        radius = rounded_down(radius, dtype)
    confidence = confidence_of(plan, index.shape)
    return SegmentationCertificate(prediction, radius, confidence, errors, noise.norm, noise.within)


@functools.partial(jax.jit, static_argnames=("structure", "plan"))
def _votes(
    arrays: list, key: Array, x: Array, index: Array, *, structure: Structure, plan: SmoothingPlan
) -> tuple[Array, Array]:
    """The class selected of every pixel (b, *pixels), `ABSTAIN` for none, and its votes."""

    def classes(z):
        logits = structure.build(arrays)(z)
        # A pixel whose logits are not all finite votes for no class.
        return predicted_class(logits)[..., None] == jnp.arange(logits.shape[-1])

    def one(image_key, pixels):
        selection = tally(classes, image_key, pixels, plan, n=plan.n0, selection=True)
        estimation = tally(classes, image_key, pixels, plan, n=plan.n)
        top = jnp.argmax(selection, axis=-1)
        return top, jnp.take_along_axis(estimation, top[..., None], axis=-1)[..., 0]

    top, votes = per_image(one, key, index, plan, x)
    good = usable(structure, arrays, x, plan.noise, plan.rows)
    return jnp.where(good.reshape(-1, *(1,) * (top.ndim - 1)), top, ABSTAIN), votes


@functools.partial(jax.jit, static_argnames=("plan", "tau", "errors"))
def _decided(top: Array, votes: Array, *, plan: SmoothingPlan, tau: float, errors: int) -> Array:
    """The classes that are certain, (b, *pixels)."""

    def one(votes):
        return step_down(votes.ravel(), plan.n, tau, plan.alpha, errors).reshape(votes.shape)

    return jnp.where(jax.lax.map(one, votes), top, ABSTAIN).astype(jnp.int32)


# With p-values p_(1) <= ... <= p_(m), reject the first, second, ... hypothesis as long as
#
#   p_(j) <= k alpha / m              for j <= k,
#   p_(j) <= k alpha / (m + k - j)    for j > k.
#
# Then k or more true hypotheses are rejected with probability at most alpha, whatever the
# dependence of the tests: Lehmann and Romano (Annals of Statistics 2005), which for k = 1 is Holm
# (Scandinavian Journal of Statistics 1979). For if m_0 hypotheses are true, the k-th of them is
# rejected at a step j <= m - m_0 + k, at a level of at most k alpha / m_0; so k true hypotheses
# have such p-values, of which k alpha are expected, and Markov's inequality gives alpha. The
# classes were selected by other draws, so that the statement holds given any selection.
def step_down(votes: Array, n: int, tau: float, alpha: float, errors: int = 0) -> Array:
    """Whose probability exceeds tau: with probability 1 - alpha, all but `errors` of them do.

    Args:
      votes: ints (m,), each of them Binomial(n, its own probability), in any dependence.
      n: number of draws.
      tau: the threshold.
      alpha: one minus the confidence.
      errors: how many may be wrong, k - 1.

    Returns:
      bool (m,).
    """
    m, k = votes.size, errors + 1
    descending = jnp.flip(jnp.sort(votes))  # p-values fall with the votes
    with jax.enable_x64(True):
        p_values = upper_tail(jnp.arange(n + 1), n, tau)[descending]
        step = jnp.maximum(jnp.arange(1, m + 1), k)
        allowed = (k * alpha * (1 - SLACK)) / (m + k - step)
        passed = jnp.cumsum((p_values > allowed).astype(jnp.int32)) == 0
        rejected = jnp.sum(passed.astype(jnp.int32)).astype(jnp.int32)
    # Equal votes are rejected together, as the allowed level rises with the step.
    least = descending[jnp.maximum(rejected, 1) - 1]
    return (votes >= least) & (rejected > 0)
