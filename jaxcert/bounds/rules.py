"""Interval rules: for each primitive, the range of its result over boxes of its operands.

Families first (increasing, decreasing, even, sums, products, comparisons), each primitive one line
in a table; functions with a rule of their own after. A rule is `(equation, values, outward) -> Box`
where a value is an array if exact and a `Box` otherwise; with `outward` it counts its own rounding,
so that the box contains the exact result for all exact operands.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.interpreter import Rule, Value, define, lower, upper
from jaxcert.errors import DataDependent
from jaxcert.graph import Equation, holds_all
from jaxcert.sets import Array, Box


def _grow(box: Box, units: float, outward: bool) -> Box:
    return rounding.widen(box, units) if outward else box


def _hull(a: Box, b: Box) -> Box:
    return Box(jnp.minimum(a.lower, b.lower), jnp.maximum(a.upper, b.upper))


def unless(bad: Array, box: Box) -> Box:
    """The box, or nothing known (NaN) where the function is undefined somewhere in it."""
    return Box(jnp.where(bad, jnp.nan, box.lower), jnp.where(bad, jnp.nan, box.upper))


# --- Increasing and decreasing functions, shape-only ones among them ------------------------------


def increasing(units: float = 0, least: float = -math.inf, most: float = math.inf) -> Rule:
    """Nondecreasing in every operand: ends map to ends. Exact where units is 0."""

    def rule(eqn, values, outward):
        lows, highs = eqn.bind(*map(lower, values)), eqn.bind(*map(upper, values))
        boxes = [Box(low, high) for low, high in zip(lows, highs, strict=True)]
        if not (outward and units):
            return boxes
        grown = [rounding.widen(box, units) for box in boxes]
        return [Box(jnp.maximum(b.lower, least), jnp.minimum(b.upper, most)) for b in grown]

    return rule


def increasing_from(start: float, units: float, least: float = -math.inf) -> Rule:
    """Nondecreasing, undefined below `start`: nothing is known of a box that reaches below."""
    forward = increasing(units, least)

    def rule(eqn, values, outward):
        (box,) = forward(eqn, values, outward)
        return unless(~(lower(values[0]) >= start), box)

    return rule


def decreasing(units: float = 0, least: float = -math.inf, most: float = math.inf) -> Rule:
    """Nonincreasing in its operand: ends swap."""
    forward = increasing(units, least, most)

    def rule(eqn, values, outward):
        swapped = [Box(upper(v), lower(v)) for v in values]
        return forward(eqn, swapped, outward)

    return rule


SHAPE_ONLY = """
    reshape broadcast_in_dim transpose squeeze slice dynamic_slice concatenate rev pad gather tile
    split stack unstack stop_gradient copy
"""
define(SHAPE_ONLY, increasing())
define("max min clamp reduce_max reduce_min reduce_window_max reduce_window_min", increasing())
define("cummax cummin sign floor ceil round and or reduce_and reduce_or", increasing())
define("neg not", decreasing())
define("add", increasing(rounding.ARITHMETIC))
define("exp2", increasing(rounding.UNITS["exp2"], least=0))
define("exp", increasing(rounding.UNITS["exp"], least=0))
define("expm1", increasing(rounding.UNITS["expm1"], least=-1))
define("log", increasing_from(0, rounding.UNITS["log"]))
define("log1p", increasing_from(-1, rounding.UNITS["log1p"]))
define("sqrt", increasing_from(0, rounding.UNITS["sqrt"], least=0))
define("cbrt", increasing(rounding.UNITS["cbrt"]))
define("tanh", increasing(rounding.UNITS["tanh"], least=-1, most=1))
define("erf", increasing(rounding.UNITS["erf"], least=-1, most=1))
define("erfc", decreasing(rounding.UNITS["erfc"], least=0, most=2))
define("logistic", increasing(rounding.UNITS["logistic"], least=0, most=1))
define("sinh", increasing(rounding.UNITS["sinh"]))
define("asinh", increasing(rounding.UNITS["asinh"]))
define(
    "atan", increasing(rounding.UNITS["atan"], least=-1.5707963267948968, most=1.5707963267948968)
)
define("erf_inv", increasing(rounding.UNITS["erf_inv"]))


def _relu(eqn, values, outward):
    """Not by the user's own equations: `where(x > 0, x, 0)` turns an unknown (NaN) end into 0."""
    return Box(*[jnp.where(end <= 0, 0.0, end) for end in (lower(values[0]), upper(values[0]))])


def _sort(eqn, values, outward):
    """Increasing for one operand. An unknown (NaN) end would move to the far side and let the other
    ends pass for its order statistics, so one makes the whole line unknown."""
    if len(values) != 1:
        raise DataDependent(
            f"'sort' carries operands in an order that depends on the input ({eqn.where()}); "
            "sort one array by itself"
        )
    (box,) = increasing()(eqn, values, outward)
    unknown = jnp.isnan(lower(values[0])) | jnp.isnan(upper(values[0]))
    return unless(jnp.any(unknown, eqn.params["dimension"], keepdims=True), box)


def _sub(eqn, values, outward):
    x, y = values
    (low,), (high,) = eqn.bind(lower(x), upper(y)), eqn.bind(upper(x), lower(y))
    return _grow(Box(low, high), rounding.ARITHMETIC, outward)


def _rsqrt(eqn, values, outward):
    box = decreasing(rounding.UNITS["rsqrt"], least=0)(eqn, values, outward)[0]
    return unless(~(lower(values[0]) > 0), box)


define("relu", _relu)
define("sort", _sort)
define("sub", _sub)
define("rsqrt", _rsqrt)


# --- Even functions and integer powers ------------------------------------------------------------


def even(units: float, at_zero: float) -> Rule:
    """Even, increasing away from zero."""

    def rule(eqn, values, outward):
        (x,) = values
        ends = [Box(y, y) for end in (lower(x), upper(x)) for y in eqn.bind(end)]
        ends = _hull(*[_grow(end, units, outward) if units else end for end in ends])
        spans_zero = (lower(x) <= 0) & (upper(x) >= 0)
        return Box(
            jnp.where(spans_zero, at_zero, jnp.maximum(ends.lower, at_zero)),
            jnp.maximum(ends.upper, at_zero),
        )

    return rule


def _integer_pow(eqn, values, outward):
    n = eqn.params["y"]
    units = 8 * abs(n)
    if n >= 0:
        family = even(units, 0.0) if n % 2 == 0 and n > 0 else increasing(units)
        return family(eqn, values, outward)
    (x,) = values
    ends = [Box(*eqn.bind(end) * 2) for end in (lower(x), upper(x))]
    box = _hull(*[_grow(end, units, outward) for end in ends])
    return unless(~((lower(x) > 0) | (upper(x) < 0)), box)


define("abs", even(0, 0.0))
define("square", even(rounding.ARITHMETIC, 0.0))
define("cosh", even(rounding.UNITS["cosh"], 1.0))
define("integer_pow", _integer_pow)


# --- Waves ----------------------------------------------------------------------------------------


def wave(peak: float) -> Rule:
    """sin or cos: 1 at `peak` + 2 pi k, -1 half way between, monotone from one to the other.

    An end that lies within rounding of an extreme counts as having passed it.
    """

    def rule(eqn, values, outward):
        (x,) = values
        slack = 8 * float(jnp.finfo(lower(x).dtype).eps)
        ends = [Box(*eqn.bind(end) * 2) for end in (lower(x), upper(x))]
        box = _hull(*[_grow(end, rounding.UNITS["sin"], outward) for end in ends])

        def passes(turn):  # whether turn + k is in the box for an integer k
            low, high = lower(x) / (2 * math.pi) - turn, upper(x) / (2 * math.pi) - turn
            margin = slack * (1 + jnp.maximum(jnp.abs(low), jnp.abs(high)))
            return jnp.floor(high + margin) >= jnp.ceil(low - margin)

        crest, trough = passes(peak / (2 * math.pi)), passes(peak / (2 * math.pi) + 0.5)
        bounds = Box(jnp.where(trough, -1.0, box.lower), jnp.where(crest, 1.0, box.upper))
        unknown = ~(jnp.isfinite(lower(x)) & jnp.isfinite(upper(x)))
        return unless(unknown, Box(jnp.maximum(bounds.lower, -1), jnp.minimum(bounds.upper, 1)))

    return rule


define("sin", wave(math.pi / 2))
define("cos", wave(0.0))


# --- Products, quotients, powers: the extremes lie at the corners ---------------------------------


def _corners(eqn: Equation, x: Value, y: Value) -> Box:
    xs = (x.lower, x.upper) if isinstance(x, Box) else (x,)
    ys = (y.lower, y.upper) if isinstance(y, Box) else (y,)
    products = [eqn.bind(a, b)[0] for a in xs for b in ys]
    low = high = products[0]
    for p in products[1:]:
        low, high = jnp.minimum(low, p), jnp.maximum(high, p)
    return Box(low, high)


def _mul(eqn, values, outward):
    return _grow(_corners(eqn, *values), rounding.ARITHMETIC, outward)


def _div(eqn, values, outward):
    x, y = values
    crosses_zero = ~((lower(y) > 0) | (upper(y) < 0))
    return unless(crosses_zero, _grow(_corners(eqn, x, y), rounding.ARITHMETIC, outward))


def _pow(eqn, values, outward):
    """x^y for x > 0 (x = 0 too where y > 0), monotone in each operand with the other fixed."""
    x, y = values
    undefined = ~((lower(x) > 0) | ((lower(x) >= 0) & (lower(y) > 0)))
    box = _grow(_corners(eqn, x, y), rounding.UNITS["pow"], outward)
    return unless(undefined, Box(jnp.maximum(box.lower, 0), box.upper))


define("mul", _mul)
define("div", _div)
define("pow", _pow)


# --- Sums -----------------------------------------------------------------------------------------


def sums(terms: Callable[[Equation], int]) -> Rule:
    """Sums of entries of one operand, `terms` of them at most."""

    def rule(eqn, values, outward):
        (x,) = values
        (low,), (high,) = eqn.bind(lower(x)), eqn.bind(upper(x))
        if not outward:
            return Box(low, high)
        n = max(terms(eqn), 1)
        size = jnp.maximum(jnp.abs(lower(x)), jnp.abs(upper(x)))
        error = rounding.inflate(eqn.bind(size)[0] * rounding.gamma(n), n)
        box = rounding.widen(Box(low - error, high + error), rounding.ARITHMETIC)
        # A sum of terms >= 0 is >= 0: without this, a square root behind it would be undefined.
        return Box(
            jnp.where(jnp.all(lower(x) >= 0), jnp.maximum(box.lower, 0), box.lower), box.upper
        )

    return rule


def _axes_size(eqn: Equation) -> int:
    return math.prod(eqn.inputs[0].shape[axis] for axis in eqn.params["axes"])


define("reduce_sum", sums(_axes_size))
define("reduce_window_sum", sums(lambda eqn: math.prod(eqn.params["window_dimensions"])))
define("cumsum", sums(lambda eqn: eqn.inputs[0].shape[eqn.params["axis"]]))


# --- Comparisons, selections, casts ---------------------------------------------------------------
#
# A comparison is a box of booleans, False < True. "Surely" needs the comparison of the ends to be
# true, "possibly" needs its opposite not to be; where any of the four ends is NaN both are open.


def comparison(surely: Callable[..., Array], not_possibly: Callable[..., Array]) -> Rule:
    """A rule from two tests of the ends (xl, xu, yl, yu)."""

    def rule(eqn, values, outward):
        ends = [end(v) for v in values for end in (lower, upper)]
        unknown = functools.reduce(jnp.logical_or, [end != end for end in ends])  # NaN
        return Box(surely(*ends) & ~unknown, ~not_possibly(*ends) | unknown)

    return rule


define("lt", comparison(lambda xl, xu, yl, yu: xu < yl, lambda xl, xu, yl, yu: xl >= yu))
define("le", comparison(lambda xl, xu, yl, yu: xu <= yl, lambda xl, xu, yl, yu: xl > yu))
define("gt", comparison(lambda xl, xu, yl, yu: xl > yu, lambda xl, xu, yl, yu: xu <= yl))
define("ge", comparison(lambda xl, xu, yl, yu: xl >= yu, lambda xl, xu, yl, yu: xu < yl))
_EQUAL = comparison(
    lambda xl, xu, yl, yu: (xl == yu) & (xu == yl), lambda xl, xu, yl, yu: (xu < yl) | (xl > yu)
)


def _eq(eqn, values, outward):
    x = values[0]
    if eqn.inputs[0] is eqn.inputs[1]:  # how `isnan` is written: surely equal if it is a number
        known = ~jnp.isnan(lower(x)) & ~jnp.isnan(upper(x))
        return Box(known, jnp.ones_like(known))
    return _EQUAL(eqn, values, outward)


def _ne(eqn, values, outward):
    box = _eq(eqn, values, outward)
    return Box(~box.upper, ~box.lower)


def _select_n(eqn, values, outward):
    """The chosen case where the choice is sure, else the hull of both."""
    which, *cases = values
    if not isinstance(which, Box):
        ends = ([end(c) for c in cases] for end in (lower, upper))
        return Box(*[eqn.bind(which, *end)[0] for end in ends])
    if len(cases) != 2:
        raise DataDependent(f"a choice among {len(cases)} depends on the input ({eqn.where()})")
    no, yes = (Box(lower(c), upper(c)) for c in cases)
    union = _hull(no, yes)
    return Box(*[
        jnp.where(which.lower, a, jnp.where(which.upper, both, b))
        for a, b, both in ((yes.lower, no.lower, union.lower), (yes.upper, no.upper, union.upper))
    ])  # fmt: skip


def _is_finite(eqn, values, outward):
    x = values[0]
    sure = jnp.isfinite(lower(x)) & jnp.isfinite(upper(x))
    return Box(sure, jnp.ones_like(sure))


def _convert(eqn, values, outward):
    """A cast. A proof treats one to a narrower type as an interval of that type's roundoff."""
    (x,) = values
    to, source = jnp.dtype(eqn.params["new_dtype"]), jnp.dtype(eqn.inputs[0].dtype)
    if not jnp.issubdtype(to, jnp.floating):
        raise DataDependent(
            f"a bounded value is cast to {to} ({eqn.where()}); integers cannot be bounded"
        )
    if not outward:
        return increasing()(eqn, values, outward)
    box = Box(*[jnp.asarray(end, jnp.float64) for end in (lower(x), upper(x))])
    if source == jnp.bool_ or holds_all(to, source):
        return box
    return _narrowed(box, jnp.finfo(to))


def _reduce_precision(eqn, values, outward):
    if not outward:
        return increasing()(eqn, values, outward)
    exponent, mantissa = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    largest = (2 - 2.0**-mantissa) * 2.0 ** (2 ** (exponent - 1) - 1)
    box = _rounded(values[0], 2.0 ** -(mantissa + 1), 2.0 ** max(2 - 2 ** (exponent - 1), -1022))
    return _unless_overflowing(values[0], largest, box)


def _narrowed(x: Value, info: Any) -> Box:
    box = _rounded(x, float(info.eps) / 2, float(info.tiny))
    return _unless_overflowing(x, float(info.max), box)


def _unless_overflowing(x: Value, largest: float, box: Box) -> Box:
    return unless(~(jnp.maximum(jnp.abs(lower(x)), jnp.abs(upper(x))) < largest), box)


def _rounded(x: Value, unit: float, tiny: float) -> Box:
    low = lower(x) - (jnp.abs(lower(x)) * unit + tiny)
    high = upper(x) + (jnp.abs(upper(x)) * unit + tiny)
    return rounding.widen(Box(low, high), rounding.ARITHMETIC)


define("eq", _eq)
define("ne", _ne)
define("select_n", _select_n)
define("is_finite", _is_finite)
define("convert_element_type", _convert)
define("reduce_precision", _reduce_precision)
