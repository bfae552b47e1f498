"""Certificates from bounds: the margin of the predicted class, bounded over the whole set."""

import dataclasses
import functools
from typing import Any, overload

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.interval import Method, ibp
from jaxcert.certificate import Certificate, Reason, Status, Verdict, issue, predicted_class
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, Structure, output_shape, split, uses_float64
from jaxcert.sets import Array, Ball, Box, InputSet, checked
from jaxcert.specs import margins, proved


@overload
def certify(f: Model, region: Box, *, method: Method = ibp) -> Verdict: ...
@overload
def certify(f: Model, region: Ball, *, method: Method = ibp) -> Certificate: ...
def certify(f: Model, region: InputSet, *, method: Method = ibp) -> Certificate | Verdict:
    """Prove that f predicts one class on the whole set.

    The bound is computed by `method(f, outward=True)`: in float64, every rounding error counted, on
    the margins f_y - f_j of the class y = argmax f(x). A margin must be strictly positive for every
    point of the set and every j != y.

    Args:
      f: the model, (b, *input) -> logits (b, k), k >= 2, rows independent.
      region: a `LinfBall`, `L2Ball` or `L1Ball`, or a bare `Box`.
      method: a bound transform with an `outward` option, e.g. `ibp` or `partial(crown, ...)`.

    Returns:
      For a ball a `Certificate`: f's own prediction, and as radius the ball's eps where proved, 0
      elsewhere, `ABSTAIN` where f's logits are not finite; `within` is the ball's valid box.
      For a `Box`, which has no radius, a `Verdict` that the class at its centre is predicted
      everywhere in it: VERIFIED or UNKNOWN.

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
    region = checked(region)
    centre = region.lower / 2 + region.upper / 2 if isinstance(region, Box) else region.x
    k = output_shape(f, centre).shape[1]
    if k < 2:
        raise ValueError("the model must return at least 2 logits, (b, k) with k >= 2")
    arrays, structure = split(f, centre)
    prediction = _predict(structure, arrays, centre)
    # Called inside of the block: float64 inputs reach the proof whole, and transformations that
    # replay the compiled program (vmap of jit) do so in float64.
    setting = _Setting(structure, method, k, uses_float64(), tuple(RULES.items()))
    with jax.enable_x64(True):
        robust = _proved(setting, *ieee_float64((arrays, region, prediction)))
    if isinstance(region, Box):
        return _verdict(prediction, robust)
    radius = jnp.where(robust, jnp.broadcast_to(region.eps, robust.shape), 0.0)
    return issue(prediction, radius, norm=region.norm, within=region.valid)


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
