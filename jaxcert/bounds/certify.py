"""Certificates from bounds: the margin of the predicted class, bounded over the whole set."""

import dataclasses
import functools
from typing import Any, overload

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.interval import ibp
from jaxcert.bounds.linear import crown
from jaxcert.bounds.planes import PLANES
from jaxcert.bounds.transform import Method
from jaxcert.certificate import Certificate, Reason, Status, Verdict, issue, predicted_class
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, Structure, output_shape, split, uses_float64
from jaxcert.sets import (
    AnySet,
    Array,
    Ball,
    Box,
    InputSet,
    L1Ball,
    L2Ball,
    LinfBall,
    Polytope,
    checked,
    uncut,
)
from jaxcert.specs import margins, proved


@overload
def certify(f: Model, region: Box | Polytope, *, method: Method = ibp) -> Verdict: ...
@overload
def certify(f: Model, region: Ball, *, method: Method = ibp) -> Certificate: ...
def certify(f: Model, region: AnySet, *, method: Method = ibp) -> Certificate | Verdict:
    """Prove that f predicts one class on the whole set.

    The bound is computed by `method(f, outward=True)`: in float64, every rounding error counted, on
    the margins f_y - f_j of the class y = argmax f(x). A margin must be strictly positive for every
    point of the set and every j != y.

    Args:
      f: the model, (b, *input) -> logits (b, k), k >= 2, rows independent.
      region: a `LinfBall`, `L2Ball` or `L1Ball`, a bare `Box`, or a `Polytope`, of which all of
        the box is looked at.
      method: a bound transform with an `outward` option, e.g. `ibp` or `partial(crown, ...)`.

    Returns:
      For a ball a `Certificate`: f's own prediction, and as radius the ball's eps where proved, 0
      elsewhere, `ABSTAIN` where f's logits are not finite; `within` is the ball's valid box.
      For a `Box` or a `Polytope`, which have no radius, a `Verdict` that the class at the box's
      centre is predicted everywhere in it: VERIFIED or UNKNOWN.

    Raises:
      ValueError, TypeError: wrong shapes, dtypes or concrete values (see `sets.checked`).
      UnsupportedEquation, MixedRows: the model cannot be bounded.

    Works under jit and vmap; called directly it is compiled once per model structure and shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> weights = jnp.array([[1.0, -1.0], [0.0, 1.0]])
      >>> x = jnp.array([[1.0, 0.0], [0.5, 0.5]])
      >>> certificate = certify(lambda x: x @ weights, LinfBall(x, 0.25))
      >>> print(certificate.prediction, certificate.radius)
      [0 0] [0.25 0.  ]
    """
    region = uncut(checked(region))
    centre = region.lower / 2 + region.upper / 2 if isinstance(region, Box) else region.x
    arrays, structure = split(f, centre)
    k = _classes(structure, arrays, centre)
    prediction = _predict(structure, arrays, centre)
    # Called inside of the block: float64 inputs reach the proof whole, and transformations that
    # replay the compiled program (vmap of jit) do so in float64.
    setting = _Setting(structure, method, k, uses_float64(), _rules())
    with jax.enable_x64(True):
        robust = _proved(setting, *ieee_float64((arrays, region, prediction)))
    if isinstance(region, Box):
        return _verdict(prediction, robust)
    radius = jnp.where(robust, jnp.broadcast_to(region.eps, robust.shape), 0.0)
    return issue(prediction, radius, norm=region.norm, within=region.valid)


_BALLS = {float("inf"): LinfBall, 2.0: L2Ball, 1.0: L1Ball}


def certified_radius(
    f: Model,
    x: Array,
    norm: float,
    *,
    largest: Any = 1.0,
    valid: Box | None = None,
    method: Method = crown,
    steps: int = 12,
) -> Certificate:
    """Prove that f predicts one class on as large a ball around each x as `method` can.

    Bisection between 0 and `largest`, all examples at once and on the device. What comes back is
    the largest radius that was itself certified, rounding counted, so nothing is assumed about how
    the bounds depend on the radius. It is within `largest` / 2^steps of the first failure.

    Args:
      f: the model, as for `certify`.
      x: inputs (b, *input).
      norm: of the balls, as numpy's `ord`: inf, 2 or 1.
      largest: the largest radius to try, a scalar or one per example (b,).
      valid: a `Box` that every input lies in anyway.
      method: a bound transform with an `outward` option.
      steps: halvings of the interval.

    Returns:
      A `Certificate`; radius 0 where nothing was proved.

    Raises:
      As `certify`.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[1.0, -1.0], [0.0, 1.0]])
      >>> x = jnp.array([[1.0, 0.0], [0.5, 0.25]])
      >>> print(certified_radius(lambda x: x @ weights, x, jnp.inf).radius)
      [0.6665039  0.24975586]
    """
    if norm not in _BALLS:
        raise ValueError(f"norm must be one of inf, 2 and 1, got {norm}")
    region: Any = checked(_BALLS[norm](x, largest, valid))
    arrays, structure = split(f, region.x)
    k = _classes(structure, arrays, region.x)
    prediction = _predict(structure, arrays, region.x)
    setting = _Setting(structure, method, k, uses_float64(), _rules())
    with jax.enable_x64(True):
        radius = _bisect(setting, steps, *ieee_float64((arrays, region, prediction)))
    return issue(prediction, radius, norm=region.norm, within=region.valid)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bisect(
    setting: "_Setting", steps: int, arrays: list[Any], ball: Ball, prediction: Array
) -> Array:
    """The largest eps for which the ball was proved."""
    largest = jnp.broadcast_to(jnp.asarray(ball.eps, jnp.float64), prediction.shape)

    def try_next(_, state):
        proved_at, failed_at, eps = state
        robust = _proved(setting, arrays, dataclasses.replace(ball, eps=eps), prediction)
        proved_at = jnp.where(robust, eps, proved_at)
        failed_at = jnp.where(robust, failed_at, eps)
        return proved_at, failed_at, proved_at / 2 + failed_at / 2

    start = jnp.zeros_like(largest), largest, largest
    return jax.lax.fori_loop(0, steps + 1, try_next, start)[0]


def _classes(structure: Structure, arrays: list[Any], x: Array) -> int:
    k = output_shape(structure, arrays, x).shape[1]
    if k < 2:
        raise ValueError("the model must return at least 2 logits, (b, k) with k >= 2")
    return k


def _rules() -> tuple[Any, ...]:
    return (*RULES.items(), *PLANES.items())


@functools.partial(jax.jit, static_argnums=0)
def _predict(structure: Structure, arrays: list[Any], centre: Array) -> Array:
    return predicted_class(structure.build(arrays)(centre))


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a compiled proof depends on beside arrays."""

    structure: Structure
    method: Method
    k: int
    mode: bool  # whether the caller is in JAX's x64 mode
    rules: tuple[Any, ...]  # a rule registered later compiles anew


@functools.partial(jax.jit, static_argnums=0)
def _proved(setting: _Setting, arrays: list[Any], region: InputSet, prediction: Array) -> Array:
    f = setting.structure.build(arrays)
    with jax.enable_x64(setting.mode):  # the transform takes the caller's mode from here
        bound = setting.method(f, outward=True)
    return proved(margins(prediction, setting.k), functools.partial(bound, region))


def _verdict(prediction: Array, robust: Array) -> Verdict:
    status = jnp.where(robust, int(Status.VERIFIED), int(Status.UNKNOWN))
    reason = jnp.where(prediction < 0, int(Reason.NUMERICS), int(Reason.LOOSE))
    return Verdict(status, jnp.where(robust, int(Reason.NONE), reason))
