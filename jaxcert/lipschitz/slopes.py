"""Intervals that hold the slopes of elementwise activations, everywhere or on a box.

An activation g, its operand z and z' in [l, u]: every secant (g(z') - g(z)) / (z' - z) lies between
the least and the greatest derivative of g on [l, u], by the mean value theorem on each piece. That
is all that is used of g. Over the whole line [l, u] is (-inf, inf).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Value, lower, upper
from jaxcert.bounds.rounding import UNIT
from jaxcert.graph import Equation, Var, unsupported
from jaxcert.sets import Array, Box

Slopes: TypeAlias = tuple[Array, Array]

Rule: TypeAlias = Callable[[Box, Sequence[Value]], Slopes]
"""(operand's box without NaN, the other operands) -> the least and the greatest slope."""

RULES: dict[str, Rule] = {}
PLACES = {"clamp": 1}  # of the bounded operand, where it is not the first

# Derivatives below are at most 2 in size; what XLA computes for them is off by far less: at most 32
# units in tanh (`bounds.rounding`), which count twice in 1 - tanh^2, and up to 16 in the others.
SLACK = 128 * UNIT


def has_slopes(eqn: Equation) -> bool:
    """Whether an equation applies a function of known slopes to each entry of one operand."""
    bounded = [i for i, atom in enumerate(eqn.inputs) if isinstance(atom, Var) and atom.bounded]
    if eqn.name in ("max", "min"):  # in either order
        return len(bounded) == 1
    return eqn.name in RULES and bounded == [PLACES.get(eqn.name, 0)]


def operand_of(eqn: Equation) -> Var:
    """The bounded operand of an activation."""
    return next(atom for atom in eqn.inputs if isinstance(atom, Var) and atom.bounded)


def slopes(eqn: Equation, values: Sequence[Value], box: Box | None) -> Slopes:
    """Bounds (b, *shape) on the slopes of an activation.

    Args:
      eqn: one for which `has_slopes` is true.
      values: its operands; the bounded one is not looked at.
      box: where the bounded operand lies; None, and NaN in it, mean anywhere.

    Returns:
      Float64 (least, greatest), rounded outward. NaN where a parameter of the activation is not
      finite.
    """
    operand = operand_of(eqn)
    if box is None:
        box = Box(jnp.full(operand.shape, -jnp.inf), jnp.full(operand.shape, jnp.inf))
    low = jnp.where(jnp.isnan(box.lower), -jnp.inf, box.lower)
    high = jnp.where(jnp.isnan(box.upper), jnp.inf, box.upper)
    others = [v for atom, v in zip(eqn.inputs, values, strict=True) if atom is not operand]
    if eqn.name not in RULES:
        raise unsupported(eqn, "lipschitz", "no interval of slopes is known for it")
    least, greatest = RULES[eqn.name](Box(low, high), others)
    # 0 times a parameter that is NaN or inf is NaN.
    spoilt = sum((0.0 * (lower(v) + upper(v)) for v in others), jnp.zeros(()))
    return least + jnp.zeros_like(low) + spoilt, greatest + jnp.zeros_like(low) + spoilt


# --- piecewise linear -----------------------------------------------------------------------------


def _pieces(left: Array, left_slopes: Slopes, right: Array, right_slopes: Slopes) -> Slopes:
    """Where the box surely lies left (right) of the kink, only that side's slopes count."""
    least = jnp.where(left, left_slopes[0], jnp.minimum(left_slopes[0], right_slopes[0]))
    greatest = jnp.where(left, left_slopes[1], jnp.maximum(left_slopes[1], right_slopes[1]))
    least = jnp.where(right, right_slopes[0], least)
    return least, jnp.where(right, right_slopes[1], greatest)


def _constant(value: float) -> Slopes:
    return jnp.full((), value), jnp.full((), value)


def _kink(before: float, after: float) -> Rule:
    """Two slopes, with the kink at 0, or at the other operand."""

    def rule(box: Box, others: Sequence[Value]) -> Slopes:
        at = others[0] if others else jnp.zeros(())
        left, right = box.upper <= lower(at), box.lower >= upper(at)
        return _pieces(left, _constant(before), right, _constant(after))

    return rule


def _leaky_relu(box: Box, others: Sequence[Value]) -> Slopes:
    (slope,) = others
    negative = lower(slope), upper(slope)
    return _pieces(box.upper <= 0, negative, box.lower >= 0, _constant(1.0))


def _clamp(box: Box, others: Sequence[Value]) -> Slopes:
    least, most = others
    outside = (box.upper <= lower(least)) | (box.lower >= upper(most))
    inside = (box.lower >= upper(least)) & (box.upper <= lower(most))
    return jnp.where(inside, 1.0, 0.0), jnp.where(outside, 0.0, 1.0)


# --- smooth ones ----------------------------------------------------------------------------------
# Many derivatives are even and fall away from 0: on a box the greatest is that at the point nearest
# to 0, the least that at the point farthest from it.


def _bell(derivative: Callable[[Array], Array], peak: float) -> Rule:
    def rule(box: Box, _: Sequence[Value]) -> Slopes:
        nearest = jnp.maximum(jnp.maximum(box.lower, -box.upper), 0.0)
        farthest = jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))
        least, greatest = derivative(farthest) - SLACK, derivative(nearest) + SLACK
        return jnp.maximum(least, 0.0), jnp.minimum(greatest, peak)

    return rule


def _tanh(r: Array) -> Array:
    t = jnp.tanh(r)
    return (1 - t) * (1 + t)


def _softplus(box: Box, _: Sequence[Value]) -> Slopes:
    """The derivative is the logistic function, which increases."""
    least, greatest = jax.nn.sigmoid(box.lower) - SLACK, jax.nn.sigmoid(box.upper) + SLACK
    return jnp.maximum(least, 0.0), jnp.minimum(greatest, 1.0)


def _elu(box: Box, others: Sequence[Value]) -> Slopes:
    """alpha exp(x) left of 0, 1 right of it."""
    (alpha,) = others
    least = jnp.maximum(jnp.exp(jnp.minimum(box.lower, 0.0)) - SLACK, 0.0)
    greatest = jnp.minimum(jnp.exp(jnp.minimum(box.upper, 0.0)) + SLACK, 1.0)
    products = [a * e for a in (lower(alpha), upper(alpha)) for e in (least, greatest)]
    low, high = functools.reduce(jnp.minimum, products), functools.reduce(jnp.maximum, products)
    low, high = low - 4 * UNIT * jnp.abs(low), high + 4 * UNIT * jnp.abs(high)
    return _pieces(box.upper <= 0, (low, high), box.lower >= 0, _constant(1.0))


# silu' = 1/2 + h(x / 2), h(y) = (tanh y + y sech^2 y) / 2 odd, h' = sech^2 y (1 - y tanh y): the
# extremes lie at y tanh y = 1, y = 1.19968, where h = y / 2. gelu' = Phi(x) + x phi(x), whose
# derivative (2 - x^2) phi(x) vanishes at x = sqrt(2), where it is 1.128904, and gelu'(-x) = 1 -
# gelu'(x). hard_swish' = (2 x + 3) / 6 between -3 and 3.


def _anywhere(least: float, greatest: float) -> Rule:
    """Slopes on the whole line, also where the box is smaller."""
    return lambda box, _: (jnp.full((), least), jnp.full((), greatest))


RULES.update(
    relu=_kink(0.0, 1.0),
    max=_kink(0.0, 1.0),
    min=_kink(1.0, 0.0),
    abs=_kink(-1.0, 1.0),
    leaky_relu=_leaky_relu,
    clamp=_clamp,
    tanh=_bell(_tanh, 1.0),
    logistic=_bell(lambda r: jax.nn.sigmoid(r) * jax.nn.sigmoid(-r), 0.25),
    atan=_bell(lambda r: 1 / (1 + r * r), 1.0),
    asinh=_bell(lambda r: 1 / jnp.sqrt(1 + r * r), 1.0),
    erf=_bell(lambda r: 2 / math.sqrt(math.pi) * jnp.exp(-r * r), 1.12837916709552),
    soft_sign=_bell(lambda r: 1 / jnp.square(1 + r), 1.0),
    softplus=_softplus,
    elu=_elu,
    silu=_anywhere(-0.1, 1.1),
    gelu_erf=_anywhere(-0.129, 1.129),
    hard_swish=_anywhere(-0.5, 1.5),
    sin=_anywhere(-1.0, 1.0),
    cos=_anywhere(-1.0, 1.0),
)
