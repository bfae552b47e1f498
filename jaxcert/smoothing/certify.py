"""Randomized smoothing: certify and predict with the smoothed model g.

g(x) is the class that f most likely returns on a noisy copy of x. It cannot be evaluated, only
sampled, so that every statement here holds with probability 1 - alpha over the key, per input.
"""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcert.certificate import ABSTAIN, Certificate, issue
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.smoothing.affine import AffineFirst
from jaxcert.smoothing.arguments import checked, require_images, require_votes
from jaxcert.smoothing.confidence import class_bounds, clopper_pearson_lower, leader_is_certain
from jaxcert.smoothing.devices import everywhere, over_images, repeated, require_mesh, share, summed
from jaxcert.smoothing.noise.base import Additive, draws_of
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import count_votes, prepared, usable

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Votes:
    """How often the model predicted each class under noise: all that a certificate rests on.

    Attributes:
      selection: int32 (b, k), of the plan's n0 draws.
      estimation: int32 (b, k), of its n draws. Draws whose logits were not finite are in none of
        the k columns.
      plan: the plan that they were drawn under; static.
    """

    selection: Array
    estimation: Array
    plan: SmoothingPlan = dataclasses.field(metadata={"static": True})


def certify(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    index: Any = None,
    mesh: Mesh | None = None,
) -> Certificate:
    """The radius within which the smoothed model g predicts what it predicts at x.

    CERTIFY of Cohen, Rosenfeld and Kolter (ICML 2019): select the class c by n0 votes, bound its
    probability from below by n fresh ones (Clopper-Pearson), R = sigma Phi^-1(p_lower) for Gaussian
    noise, abstain where p_lower <= 1/2. Every image keeps its own confidence 1 - alpha; the
    probability that some certificate of m is wrong is at most alpha m.

    Args:
      key: a scalar `jax.random.key`. One key gives one result: the votes of image i depend on
        key, index[i] and x[i] alone, not on the batch it comes in.
      f: the model, (b, *input) -> (b, k), in eval mode. A pytree model's arrays are arguments of
        the compiled function: a second net of the same shapes compiles nothing.
      x: floats (b, *input). An image that is not finite gets `ABSTAIN`.
      plan: a `SmoothingPlan`.
      index: ints (b,), the numbers of the images in their data set; default arange(b).
      mesh: devices to share the work: along its axis "images" those of the batch, along its axis
        "samples" the draws of each. The votes are the same for every mesh.

    Returns:
      A `Certificate` about g with norm `plan.noise.norm`, within `plan.noise.within`, of confidence
      1 - alpha.

    Raises:
      TypeError, ValueError: for integer images, a missing batch axis, a raw uint32 key, an index
        of another shape, a model that returns anything but float logits (b, k) with k >= 2.
        Also for a model whose logits are not finite on any draw.
      MixedRows: an example's output depends on other examples, or on its place in the batch, so
        that the votes of a chunk would not be independent (batch normalisation in training mode).
      StatefulModel: each call of the model is another function (active dropout).

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=2000)
      >>> sign = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x = jnp.array([[1.0], [0.0]])  # the exact radius is |x|
      >>> certificate = certify(jax.random.key(0), sign, x, plan)
      >>> print(certificate.prediction, 0.8 < certificate.radius[0] < 1)
      [ 0 -1] True
    """
    return bound(count(key, f, x, plan, index=index, mesh=mesh), x, plan)


def count(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    index: Any = None,
    mesh: Mesh | None = None,
) -> Votes:
    """The votes that `certify` rests on; `bound` makes the certificate of them.

    Kept, they give certificates in another norm, or at another alpha, without a new draw.
    Arguments and errors are those of `certify`.
    """
    require_mesh(mesh)
    x, index = checked(key, x, plan, index)
    arrays, structure, _ = prepared(f, x, plan)
    _require_affine(structure, arrays, x, plan)
    # Draws do not depend on what is concluded from them: another alpha compiles nothing.
    drawn = dataclasses.replace(plan, alpha=0.9, runner_up=False)
    estimation, selection = _count(
        arrays, key, x, index, structure=structure, plan=drawn, n0=plan.n0, mesh=mesh
    )
    require_votes(estimation, plan.noise, x)
    return Votes(selection, estimation, plan)


def bound(votes: Votes, x: Any, plan: SmoothingPlan) -> Certificate:
    """The certificate that votes on the images x (b, *input) prove, under the plan's alpha.

    The plan may differ from that of `count` in alpha, in `runner_up` and in the norm of its noise,
    but all are to be chosen before the votes are seen: of two tried on the same votes, both errors
    count.

    Raises:
      TypeError: for anything but votes and a plan for them.
      ValueError: for a plan that the votes were not drawn under, or images that are not theirs.
    """
    if not isinstance(votes, Votes) or not isinstance(plan, SmoothingPlan):
        raise TypeError(
            "type bound(count(key, f, x, plan), x, plan) with a SmoothingPlan, got "
            f"{type(votes).__name__} and {type(plan).__name__}"
        )
    drawn = votes.plan
    if (draws_of(drawn.noise), drawn.n) != (draws_of(plan.noise), plan.n):
        raise ValueError(
            f"these votes were drawn with {drawn.noise} and n={drawn.n}, the plan has {plan.noise} "
            f"and n={plan.n}; only alpha, runner_up and the norm may differ"
        )
    x = require_images(x)
    if len(x) != len(votes.estimation):
        raise ValueError(f"there are votes on {len(votes.estimation)} images, got {len(x)}")
    votes, x = ieee_float64((votes, x))
    return _bound(votes, x, plan=plan)


def predict(
    key: Array,
    f: Model,
    x: Any,
    plan: SmoothingPlan,
    *,
    index: Any = None,
    mesh: Mesh | None = None,
) -> Array:
    """The class g predicts, or `ABSTAIN`; wrong with probability at most alpha per input.

    PREDICT of Cohen, Rosenfeld and Kolter (ICML 2019), with the two-sided test of Hung and Fithian
    (Annals of Statistics 2019) between the two leading classes of plan.n votes. Arguments and
    errors as for `certify`; with the same key it sees the same draws, so that a check of one by
    the other needs a second key.

    Returns:
      int32 (b,).
    """
    require_mesh(mesh)
    x, index = checked(key, x, plan, index)
    arrays, structure, _ = prepared(f, x, plan)
    _require_affine(structure, arrays, x, plan)
    votes, _ = _count(arrays, key, x, index, structure=structure, plan=plan, n0=0, mesh=mesh)
    require_votes(votes, plan.noise, x)
    return _leader(ieee_float64(votes), plan.alpha)


@functools.partial(jax.jit, static_argnames="plan")
def _bound(votes: Votes, x: Array, *, plan: SmoothingPlan) -> Certificate:
    top = jnp.argmax(votes.selection, axis=1)
    with jax.enable_x64(True):
        if plan.runner_up:
            p_lower, p_upper = class_bounds(votes.estimation, top, plan.n, plan.alpha)
        else:
            successes = jnp.take_along_axis(votes.estimation, top[:, None], axis=1)[:, 0]
            p_lower, p_upper = clopper_pearson_lower(successes, plan.n, plan.alpha), None
        radius = plan.noise.radius(p_lower, p_upper, x)
        prediction = jnp.where(radius > 0, top, ABSTAIN)
    return issue(
        prediction,
        radius,
        norm=plan.noise.norm,
        within=plan.noise.within,
        confidence=confidence(plan.alpha),
    )


def confidence(alpha: float) -> float:
    """1 - alpha; 1 is kept for proofs, however small alpha is."""
    return min(1 - alpha, math.nextafter(1, 0))


@functools.partial(jax.jit, static_argnames="alpha")
def _leader(counts: Array, alpha: float) -> Array:
    (first, second), (top, _) = (part.T for part in jax.lax.top_k(counts, 2))
    return jnp.where(leader_is_certain(first, second, alpha), top, ABSTAIN).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("structure", "plan", "n0", "mesh"))
def _count(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    *,
    structure: Structure,
    plan: SmoothingPlan,
    n0: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """`count_votes`, with no votes at all where they would mean nothing, so that it abstains."""

    def counted(arrays, key, x, index):
        f = rebuilt(structure, arrays)
        return summed(count_votes(key, f, x, index, plan, n0=n0, share=share(mesh)), mesh)

    whole = repeated(x, index, plan.group)
    votes = over_images(counted, mesh, plan.group)(arrays, key, *whole)
    good = usable(structure, arrays, x, plan.noise, plan.rows)
    good &= _in_one_group(whole[1], plan.group)[: len(x)]
    estimation, selection = (jnp.where(good[:, None], part[: len(x)], 0) for part in votes)
    return everywhere((estimation, selection), mesh)


def rebuilt(structure: Structure, arrays: list) -> Model:
    """The model, rebuilt wherever it is applied, so that a module may update its own state there.

    For inside of a loop.
    """
    if isinstance(structure.build(arrays), AffineFirst):
        return AffineFirst(
            lambda z: structure.build(arrays).first(z),  # pyright: ignore
            lambda h: structure.build(arrays).rest(h),  # pyright: ignore
        )
    return lambda z: structure.build(arrays)(z)


def _in_one_group(index: Array, group: int) -> Array:
    """Whether the images that are counted together belong together; bool (b,)."""
    groups = index.reshape(-1, group) // jnp.uint32(group)
    return jnp.repeat(jnp.all(groups == groups[:, :1], axis=1), group)


def _require_affine(structure: Structure, arrays: list, x: Array, plan: SmoothingPlan) -> None:
    model = structure.build(arrays)
    if not isinstance(model, AffineFirst):
        return
    if not isinstance(plan.noise, Additive):
        raise ValueError(
            f"AffineFirst adds noise behind the first layer, and {type(plan.noise).__name__} is "
            "not noise that is added; pass the model itself"
        )
    model.check(jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype))
