"""Several labels per input: which of them are surely on, and which surely off, and how far."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.certificate import ABSTAIN
from jaxcert.floats import ieee_float64, rounded_down
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, Grid
from jaxcert.smoothing.arguments import checked
from jaxcert.smoothing.confidence import clopper_pearson_lower
from jaxcert.smoothing.outputs import (
    confidence_of,
    per_image,
    tally,
)
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import prepared, usable

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class LabelsCertificate:
    """For every label and every x' with |x' - x|_norm <= its radius, g(x') turns it on or off as
    `prediction` says.

    g(x') turns a label on if f does so on x' + noise with a probability above 1/2, and off if f
    leaves it off with a probability above 1/2. All labels of an input hold together with its
    confidence: the labels surely on within r are `(prediction == 1) & (radius >= r)`.

    Attributes:
      prediction: int32 (b, k): 1 on, 0 off, or `ABSTAIN`.
      radius: (b, k), rounded down; 0 where nothing is proved.
      confidence: (b,), 1 - alpha.
      norm: of the radius; static.
      within: where x' must lie, as the noise says; None for everywhere.
    """

    prediction: Array
    radius: Array
    confidence: Array
    norm: Any = dataclasses.field(metadata={"static": True})
    within: Box | Grid | None = None


def positive(logits: Array) -> Array:
    """The labels whose logit is above 0."""
    return logits > 0


def certify(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    labels: Callable[[Array], Array] = positive,
    index: Any = None,
) -> LabelsCertificate:
    """For each label, the radius within which the smoothed model keeps it on, or keeps it off.

    The binary certificate of Cohen, Rosenfeld and Kolter (ICML 2019) for each of the k labels:
    plan.n0 draws say which side to prove, plan.n fresh ones bound its probability at level
    alpha / k, so that all hold at once (Bonferroni). A draw whose logits are not all finite turns
    no label on, and none off.

    Args:
      key: a scalar `jax.random.key`.
      f: the model, (b, *input) -> (b, k) logits, in eval mode.
      x: floats (b, *input). An input that is not finite gets `ABSTAIN`.
      plan: a `SmoothingPlan`, any noise; its runner_up plays no part.
      labels: which labels a batch of logits turns on, (b, k) -> bool (b, k), row by row; static.
      index: ints (b,), the numbers of the inputs in their data set; default arange(b).

    Returns:
      `LabelsCertificate`.

    Raises:
      TypeError, ValueError: for arguments of another kind, as `jaxcert.smoothing.certify` does.
      MixedRows, StatefulModel: where the votes would not be independent.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=2000)
      >>> x = jnp.array([[1.0, 0.0, -1.0]])  # three logits, which the noise moves
      >>> certificate = certify(jax.random.key(0), lambda x: 1.0 * x, x, plan)
      >>> print(certificate.prediction, 0.8 < certificate.radius[0, 0] < 1)
      [[ 1 -1  0]] True
    """
    x, index = checked(key, x, plan, index)
    arrays, structure, out = prepared(f, x, plan)
    if len(out) != 1:
        raise ValueError(f"the model must return logits (b, k), got (b, *{out})")
    side, votes = _votes(arrays, key, x, index, structure=structure, plan=plan, labels=labels)
    prediction, radius = _decided(*ieee_float64((side, votes, x)), plan=plan)
    confidence = confidence_of(plan, index.shape)
    return LabelsCertificate(prediction, radius, confidence, plan.noise.norm, plan.noise.within)


@functools.partial(jax.jit, static_argnames=("structure", "plan", "labels"))
def _votes(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    *,
    structure: Structure,
    plan: SmoothingPlan,
    labels: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """The side selected of every label (b, k), and its votes (b, k)."""

    def sides(z):
        logits = structure.build(arrays)(z)
        finite = jnp.all(jnp.isfinite(logits), axis=1, keepdims=True)
        on = labels(logits)
        return jnp.stack([~on & finite, on & finite], axis=1)  # (chunk, 2, k)

    def one(image_key, pixels):
        selection = tally(sides, image_key, pixels, plan, n=plan.n0, selection=True)
        estimation = tally(sides, image_key, pixels, plan, n=plan.n)
        side = (selection[1] > selection[0]).astype(jnp.int32)
        return side, jnp.where(side, estimation[1], estimation[0])

    side, votes = per_image(one, key, index, plan, x)
    good = usable(structure, arrays, x, plan.noise, plan.rows)
    return side, jnp.where(good[:, None], votes, 0)


@functools.partial(jax.jit, static_argnames="plan")
def _decided(side: Array, votes: Array, x: Array, *, plan: SmoothingPlan) -> tuple[Array, Array]:
    """Predictions and radii, both (b, k)."""
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        p_lower = clopper_pearson_lower(votes, plan.n, plan.alpha / votes.shape[1])
        # One label at a time, as the radius may depend on the input too.
        radius = jax.vmap(lambda p: plan.noise.radius(p, None, x), 1, 1)(p_lower)
        proved = radius > 0
        radius = rounded_down(jnp.where(proved, radius, 0.0), dtype)
    return jnp.where(proved, side, ABSTAIN), radius
