"""Two lines around each nonlinear function of one operand, for linear bound propagation.

    lower_slope x + lower_offset  <=  f(x)  <=  upper_slope x + upper_offset    for l <= x <= u.

The best leave the least area between them. The area under a line is its height at the centre of
[l, u] times the width, so the best lower line is the one that supports the convex envelope of f at
the centre, and the best upper line supports the concave envelope.

A slope needs no proof: for any slope a, the offset min (max) of f(x) - a x makes the line sound.
Functions with one kink attain it at an end. All others are a `Curve`: a derivative and the two
points between which they are convex. Where nothing is known or numbers overflow, the lines are the
ends of the interval rule, with slope 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxcert.bounds import rounding
from jaxcert.bounds.functions import at_point
from jaxcert.bounds.interpreter import RULES, Value, lower, upper
from jaxcert.bounds.rules import unless
from jaxcert.graph import Equation, Var, unsupported
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box


@pytree
@dataclasses.dataclass(frozen=True)
class Lines:
    """A line below and a line above a function on a box, each array of the operand's shape."""

    lower_slope: Array
    lower_offset: Array
    upper_slope: Array
    upper_offset: Array


Relax: TypeAlias = Callable[[Equation, Sequence[Value], bool], Lines]
"""(equation, operands, outward) -> `Lines`, for finite boxes and exact constants."""

LINES: dict[str, Relax] = {}

# In a model of another type their coefficients are rounded, which moves the inflection points.
WITH_COEFFICIENTS = frozenset(["gelu_erf", "gelu_tanh"])


def lines(eqn: Equation, values: Sequence[Value], outward: bool) -> Lines:
    """Lines around an equation's result for every value of its one bounded operand in its box.

    With `outward` they hold in real arithmetic for the floats returned; else up to rounding, with
    their derivatives almost everywhere. Where the interval rule knows nothing, offsets are NaN.
    """
    operand = values[_place(eqn)]
    x = Box(lower(operand), upper(operand))
    flat = _range(eqn, values, outward)
    ends = x.lower, x.upper, flat.lower, flat.upper
    flat = unless(functools.reduce(jnp.logical_or, map(jnp.isnan, ends)), flat)
    zero = jnp.zeros_like(x.lower)
    rounded = outward and eqn.name in WITH_COEFFICIENTS and eqn.outputs[0].dtype != jnp.float64
    if rounded or any(isinstance(v, Box) for v in _constants(eqn, values)):
        return Lines(zero, flat.lower + zero, zero, flat.upper + zero)
    size = jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper))
    known = (x.lower <= x.upper) & (size < 2.0**100) & ~jnp.isnan(flat.lower)
    # Elsewhere any harmless box will do: a NaN in it would spoil every derivative.
    safe = Box(jnp.where(known, x.lower, 1.0), jnp.where(known, x.upper, 1.0))
    found = LINES[eqn.name](eqn, _with(eqn, values, safe), outward)
    steepest = float(jnp.finfo(zero.dtype).max) / 4

    def line(slope, offset, end):
        good = known & (jnp.abs(slope) < steepest) & jnp.isfinite(offset)
        return jnp.where(good, slope, 0.0), jnp.where(good, offset, end).astype(zero.dtype)

    return Lines(
        *line(found.lower_slope, found.lower_offset, flat.lower),
        *line(found.upper_slope, found.upper_offset, flat.upper),
    )


def _place(eqn: Equation) -> int:
    places = [i for i, atom in enumerate(eqn.inputs) if isinstance(atom, Var) and atom.bounded]
    if len(places) != 1:
        raise unsupported(eqn, "linear bound propagation", "one operand may be bounded; use ibp")
    return places[0]


def _with(eqn: Equation, values: Sequence[Value], operand: Value) -> list[Value]:
    return [operand if i == _place(eqn) else v for i, v in enumerate(values)]


def _constants(eqn: Equation, values: Sequence[Value]) -> list[Value]:
    return [v for i, v in enumerate(values) if i != _place(eqn)]


def _range(eqn: Equation, values: Sequence[Value], outward: bool) -> Box:
    result = RULES[eqn.name](eqn, values, outward)
    return result[0] if isinstance(result, list) else result


def value_at(eqn: Equation, values: Sequence[Value], outward: bool, p: Array) -> Box:
    """f(p), in a proof enclosed."""
    if outward and eqn.inner is None:
        return _range(eqn, _with(eqn, values, Box(p, p)), outward)
    if outward:
        return at_point(eqn, p, _constants(eqn, values), outward)
    (y,) = eqn.bind(*_with(eqn, values, p))
    return Box(y, y)


def _slack(outward: bool, units: float, *sizes: Array) -> Array | float:
    """How far a proof moves a line whose terms have these sizes; the rest covers underflow."""
    return sum(sizes) * (units * rounding.UNIT) + 2.0**-900 if outward else 0.0


# --- Functions with one kink ----------------------------------------------------------------------
#
# f(x) = left x + below for x <= kink, right x + above for x >= kink. If left <= right then f is the
# larger of its two pieces: each lies below f, exactly, and the one that is larger at the centre
# supports f there (Zhang et al., NeurIPS 2018, eq. 5: slope 1 below a relu iff u > -l). Above lies
# the chord, raised to the higher end. If left >= right, the same upside down. On one side of the
# kink both lines are that piece itself. An end (left - a) l + below is rounded three times.


def kinked(pieces: Callable[..., tuple[Any, Any, Any, Any, Any]]) -> Relax:
    """Lines from `pieces(*constants)` = (kink, left, below, right, above)."""

    def rule(eqn, values, outward):
        x = values[_place(eqn)]
        kink, left, below, right, above = pieces(*_constants(eqn, values))
        l, u = x.lower, x.upper
        convex = jnp.asarray(left <= right)
        crosses = (l < kink) & (kink < u)
        share = jnp.where(crosses, u - kink, 0.0) / jnp.where(crosses, u - l, 1.0)
        chord = left + (right - left) * share
        ends = (left - chord) * l + below, (right - chord) * u + above
        size = (abs(left) + abs(right)) * jnp.maximum(jnp.abs(l), jnp.abs(u))
        slack = _slack(outward, 16, size, abs(below) + abs(above))
        lifted = jnp.where(convex, jnp.maximum(*ends) + slack, jnp.minimum(*ends) - slack)
        on_right = jnp.where(crosses, l / 2 + u / 2 > kink, l >= kink)
        piece = jnp.where(on_right, right, left), jnp.where(on_right, above, below)
        other = jnp.where(crosses, chord, piece[0]), jnp.where(crosses, lifted, piece[1])
        pairs = zip((*piece, *other), (*other, *piece), strict=True)
        return Lines(*[jnp.where(convex, *pair).astype(l.dtype) for pair in pairs])

    return rule


LINES["relu"] = kinked(lambda: (0.0, 0.0, 0.0, 1.0, 0.0))
LINES["abs"] = kinked(lambda: (0.0, -1.0, 0.0, 1.0, 0.0))
LINES["max"] = kinked(lambda c: (c, 0.0, c, 1.0, 0.0))
LINES["min"] = kinked(lambda c: (c, 1.0, 0.0, 0.0, c))
LINES["leaky_relu"] = kinked(lambda slope: (0.0, slope, 0.0, 1.0, 0.0))


# --- Curves ---------------------------------------------------------------------------------------
#
# Let f be concave up to a point i1, convex from there to i2, concave after. A line below f is found
# here; the line above f is the negative of one below -f, whose convex pieces are f's concave ones.
#
# **Slope.** Let [p, q] be the convex piece of f in [l, u]. A tangent at c in [p, q] lies below f on
# [l, u] iff it does so at l and at u, because f is concave outside of [p, q]. Its height at l falls
# with c, and at u rises, since d/dc (f(c) + f'(c) (x - c)) = f''(c) (x - c). So the tangents below
# f are those at c in [c1, c2], ends found by bisection. The envelope at the centre m is supported
# by the tangent at m if it is one of these; for m < c1 by the line from (l, f(l)) that touches at
# c1; for m > c2 by the one to (u, f(u)) that touches at c2; and if c1 > c2 by the chord. Where -f
# has two convex pieces in [l, u] the chord's slope is taken: silu and its like hardly rise above
# their chord there.
#
# **Offset.** With g(x) = f(x) - a x, on concave pieces g >= min(g(l), g(u), g(p), g(q)), and on a
# convex piece [p, q], for any c in it,
#     g(x) >= g(c) + g'(c) (x - c) >= g(c) + min(g'(c), 0) (q - c) - max(g'(c), 0) (c - p).
# Where c is the touching point, g'(c) is 0 up to rounding, and only a proof adds these terms.
#
# **Derivatives.** Touching points c1, c2 are held fixed: the slope (f(c1) - f(l)) / (c1 - l) is
# stationary in c1 where the line is tangent, and so is g(c) in c (the envelope theorem).
#
# **Rounding.** Let R = |p| + |q|, and S(c) >= |f'(c)| the sum of the sizes of its terms. The
# computed f'(c) errs by at most 2^14 u S(c): each formula below is a product of factors with small
# relative errors (rounding.UNITS, up to 4096 u; an exponential also multiplies its argument's few u
# by at most 745) or a sum of two such products. Times q - c <= R that is 2^14 u S(c) R; products
# and differences add 8 u (|f(c)| + (|a| + S(c)) R); f(c) itself is enclosed. Stored inflection
# points err by at most 8 u R: where the true piece is longer that costs |g'(c)| 8 u R, where it is
# shorter of the order of (u R)^3. Underflow in f'(c), below 2^-1000, meets a box below 2^100. In
# all less than 2^16 u (|f(c)| + (|a| + S(c)) R) + 2^-900.


class _Piece(NamedTuple):
    """A convex piece [start, end] of [l, u], and whether others may lie left or right of it."""

    start: Array
    end: Array
    left: bool = True
    right: bool = True


@dataclasses.dataclass(frozen=True)
class Curve:
    """A function by its shape; calling it gives its lines.

    Attributes:
      slope: (x, *constants) -> f'(x), a supporting slope where f has a kink.
      bends: (i1, i2): concave up to i1, convex up to i2, concave after; floats or arrays.
      terms: by how much the sizes of the terms of f'(x) may sum up to more than |f'(x)|.
    """

    slope: Callable[..., Array]
    bends: tuple[Any, Any]
    terms: float = 0.0

    def __call__(self, eqn: Equation, values: Sequence[Value], outward: bool) -> Lines:
        """The lines of the curve that an equation draws over a finite box."""
        box, constants = values[_place(eqn)], _constants(eqn, values)
        first, last = (jnp.clip(bend, box.lower, box.upper) for bend in self.bends)

        def side(sign, pieces):
            def f(p):
                value = value_at(eqn, values, outward, p)
                return value.lower if sign > 0 else -value.upper

            def slope(p):
                return sign * self.slope(p, *constants)

            a, t = _Side(f, slope, self.terms, box, (first, last), outward).line(pieces)
            return sign * a, sign * t

        # Pieces that are empty in every box are left out.
        before, middle = not _is(self.bends[0], -math.inf), not _is(self.bends[0], math.inf)
        after = not _is(self.bends[1], math.inf)
        convex = [_Piece(first, last, before, after)] if middle else []
        concave = [_Piece(box.lower, first, False, middle)] if before else []
        concave += [_Piece(last, box.upper, middle, False)] if after else []
        return Lines(*side(1, convex), *side(-1, concave))


def _is(bend: Any, value: float) -> bool:
    return isinstance(bend, float) and bend == value


@dataclasses.dataclass(frozen=True)
class _Side:
    """f, or -f for the line above: a lower bound of its values, its derivative, where it turns."""

    f: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    terms: float
    box: Box
    bends: tuple[Array, Array]
    outward: bool

    def line(self, pieces: Sequence[_Piece]) -> tuple[Array, Array]:
        """Slope and offset, where f is convex on the pieces and concave outside of them."""
        l, u = self.box.lower, self.box.upper
        if not pieces:
            a, touched = self.chord(l, u), []
        elif len(pieces) == 1:
            a, *touched = self.supporting(pieces[0], jnp.asarray(False))
        else:
            one, two = pieces
            choose = functools.partial(jnp.where, one.start < one.end)
            either = _Piece(choose(one.start, two.start), choose(one.end, two.end))
            a, _ = self.supporting(either, (one.start < one.end) & (two.start < two.end))
            held = lax.stop_gradient(a)
            # Towards the bend, where f may have a kink, and not past it.
            touched = [_last(lambda c: self.slope(c) <= held, one.start, one.end)]
            touched += [_last(lambda c: self.slope(c) >= held, two.end, two.start)]
        offsets = [self.rest(a, p) for p in (l, u)]
        offsets += [self.rest(a, c, piece) for c, piece in zip(touched, pieces, strict=True)]
        return a, functools.reduce(jnp.minimum, offsets)

    def supporting(self, piece: _Piece, chord: Array) -> tuple[Array, Array]:
        """The slope that supports the envelope at the centre, and where; or the chord's."""
        l, u = self.box.lower, self.box.upper
        m = l / 2 + u / 2
        first, last = piece.start, piece.end
        if piece.left:
            first = _last(self.tangent_below(l), piece.end, piece.start)
        if piece.right:
            last = _last(self.tangent_below(u), piece.start, piece.end)
        before, after, chord = m < first, m > last, chord | (first > last)
        p = jnp.where(chord | before, l, jnp.where(after, last, m))
        q = jnp.where(chord | after, u, jnp.where(before, first, m))
        return self.chord(p, q), jnp.clip(m, first, last)

    def tangent_below(self, x: Array) -> Callable[[Array], Array]:
        """The condition on c that the tangent at c lies below f at x."""
        x, y = lax.stop_gradient((x, self.f(x)))
        return lambda c: self.f(c) + self.slope(c) * (x - c) <= y

    def chord(self, p: Array, q: Array) -> Array:
        """(f(q) - f(p)) / (q - p), or the mean of f' at p and q where that is more exact.

        Rounding of f disturbs the former by eps |f| / (q - p), and its derivatives by as much
        again over q - p. The latter errs by a third derivative times (q - p)^2; p may equal q.
        """
        start, end = lax.stop_gradient((p, q))
        slopes = [self.slope(jnp.clip(c, start, end)) for c in (start, end, *self.bends)]
        varies = functools.reduce(jnp.maximum, slopes) - functools.reduce(jnp.minimum, slopes)
        low, high = self.f(p), self.f(q)
        noise = 256 * jnp.finfo(p.dtype).eps * (jnp.abs(low) + jnp.abs(high))
        short = ~(noise < varies * (end - start))
        mean = self.slope(p) / 2 + self.slope(q) / 2
        return jnp.where(short, mean, (high - low) / jnp.where(short, 1.0, q - p))

    def rest(self, a: Array, c: Array, piece: _Piece | None = None) -> Array:
        """f(c) - a c; in a proof the least f(x) - a x on the convex piece where c lies."""
        y = self.f(c)
        least, sizes = y - a * c, [jnp.abs(y), jnp.abs(a * c)]
        if self.outward and piece is not None:
            rise = self.slope(c) - a
            least += jnp.minimum(rise, 0) * (piece.end - c)
            least -= jnp.maximum(rise, 0) * (c - piece.start)
            reach = jnp.abs(piece.start) + jnp.abs(piece.end)
            sizes.append((jnp.abs(a) + jnp.abs(self.slope(c)) + self.terms) * reach)
        return least - _slack(self.outward, 2.0**16, *sizes)


def _last(holds: Callable[[Array], Array], start: Array, end: Array) -> Array:
    """The last point on the way from start to end up to which a condition holds; start if none."""

    def halve(_, state):
        near, far, probe = state
        held = holds(probe)
        near, far = jnp.where(held, probe, near), jnp.where(held, far, probe)
        return near, far, near / 2 + far / 2

    ends, steps = lax.stop_gradient((start, end, end)), jnp.finfo(start.dtype).nmant + 8
    last = lax.stop_gradient(lax.fori_loop(0, steps, halve, ends)[0])
    # Held fixed, unless it is an end, which moves with the box.
    return jnp.where(last == start, start, jnp.where(last == end, end, last))


# --- The derivatives ------------------------------------------------------------------------------


def _bell(x):
    w = jnp.exp(-jnp.abs(x))
    return w / jnp.square(1 + w)


def _gauss(x):
    return (2 / math.sqrt(math.pi)) * jnp.exp(-jnp.square(x))


def _steep(formula: Callable[..., Array]) -> Callable[..., Array]:
    """A derivative that may be infinite at 0: the largest float stands for it there."""

    def slope(x, *constants):
        away = formula(jnp.where(x == 0, 1.0, x), *constants)
        return jnp.where(x == 0, jnp.finfo(x.dtype).max, away)

    return slope


CONVEX, CONCAVE = (-math.inf, math.inf), (math.inf, math.inf)
S_SHAPED, S_REVERSED = (-math.inf, 0.0), (0.0, math.inf)

LINES["exp"] = LINES["expm1"] = Curve(jnp.exp, CONVEX)
LINES["exp2"] = Curve(lambda x: math.log(2) * jnp.exp2(x), CONVEX)
LINES["square"] = Curve(lambda x: 2 * x, CONVEX)
LINES["cosh"] = Curve(jnp.sinh, CONVEX)
LINES["softplus"] = Curve(jax.nn.sigmoid, CONVEX)
LINES["rsqrt"] = Curve(lambda x: -0.5 * lax.rsqrt(x) / x, CONVEX)
LINES["log"] = Curve(_steep(lambda x: 1 / x), CONCAVE)
LINES["log1p"] = Curve(lambda x: _steep(lambda y: 1 / y)(1 + x), CONCAVE)
LINES["sqrt"] = Curve(_steep(lambda x: 0.5 * lax.rsqrt(x)), CONCAVE)
LINES["logistic"] = Curve(_bell, S_SHAPED)
LINES["tanh"] = Curve(lambda x: 4 * _bell(2 * x), S_SHAPED)
LINES["erf"] = Curve(_gauss, S_SHAPED)
LINES["atan"] = Curve(lambda x: 1 / (1 + jnp.square(x)), S_SHAPED)
LINES["asinh"] = Curve(lambda x: lax.rsqrt(1 + jnp.square(x)), S_SHAPED)
LINES["soft_sign"] = Curve(lambda x: 1 / jnp.square(1 + jnp.abs(x)), S_SHAPED)
LINES["cbrt"] = Curve(_steep(lambda x: 1 / (3 * jnp.square(jnp.cbrt(x)))), S_SHAPED)
LINES["sinh"] = Curve(jnp.cosh, S_REVERSED)
LINES["erfc"] = Curve(lambda x: -_gauss(x), S_REVERSED)


# Gates, f(x) = x g(x), f' = g + x g'. Their two inflection points, computed with 25 digits from the
# equations below, which have no other solution. With w = e^x:
#   silu:      f'' = g (1 - g) (2 - x tanh(x / 2)), and x tanh(x / 2) rises with |x|.
#   gelu_erf:  f'' = (2 - x^2) times the normal density: sqrt(2).
#   gelu_tanh: g = logistic(z), z = 2 k (x + c x^3); f'' has the sign of
#              (2 z' + x z'') / z'^2 - x tanh(z / 2). With s = 3 c x^2 the first term is
#              (1 + 2 s) / (1 + s)^2 / k, which falls with |x|; the second one rises.
#   mish:      g = n / (n + 2), n = w^2 + 2 w; f'' has the sign of 1 - x R(w),
#              R = (2 w^3 + 3 w^2 - 2 w - 2) / (2 (w + 1) (w^2 + 2 w + 2)), rising from -1/2, zero
#              at x = -0.12: x R <= 0 between there and 0, falls before and rises after.


def _gated(gate: Callable[[Array], tuple[Array, Array]], bends: tuple[float, float]) -> Curve:
    """x g(x), from x -> (g, g'); all have g <= 1 and |x| g' < 1/2."""

    def slope(x):
        g, rise = gate(x)
        return g + x * rise

    return Curve(slope, bends, terms=2.0)


def _gate_erf(x):
    return 0.5 * lax.erfc(x * -math.sqrt(0.5)), math.sqrt(0.125) * _gauss(x * math.sqrt(0.5))


def _gate_tanh(x):
    k, c = math.sqrt(2 / math.pi), 0.044715
    z = 2 * k * (x + c * x * x * x)
    return jax.nn.sigmoid(z), 2 * k * (1 + 3 * c * x * x) * _bell(z)


def _gate_mish(x):
    w = jnp.exp(-jnp.abs(x))
    n, total = jnp.where(x > 0, 1 + 2 * w, w * (w + 2)), jnp.where(x > 0, 2 * w * w, 2.0)
    return n / (n + total), 4 * w * (1 + w) * jnp.where(x > 0, w, 1.0) / jnp.square(n + total)


SILU, GELU_ERF, GELU_TANH = 2.3993572805154677, math.sqrt(2), 1.4185040087908284
LINES["silu"] = _gated(lambda x: (jax.nn.sigmoid(x), _bell(x)), (-SILU, SILU))
LINES["gelu_erf"] = _gated(_gate_erf, (-GELU_ERF, GELU_ERF))
LINES["gelu_tanh"] = _gated(_gate_tanh, (-GELU_TANH, GELU_TANH))
LINES["mish"] = _gated(_gate_mish, (-2.2563763963607931, 1.4905711794854285))
LINES["hard_swish"] = Curve(
    lambda x: jnp.where(jnp.abs(x) <= 3, x / 3 + 0.5, 1.0 * (x > 0)), (-3.0, 3.0), terms=2.0
)


# min(max(x, low), high) has a convex kink at low and a concave one at high. The line between is
# both: it counts as concave below and as convex above, so that no kink is inside of a piece.


def _clamp(eqn, values, outward):
    if _place(eqn) != 1:
        raise unsupported(eqn, "linear bound propagation", "clamp the input between constants")

    def slope(x, low, high):
        return ((low <= x) & (x <= high)).astype(x.dtype)

    low, high = (Curve(slope, (-math.inf, values[i]))(eqn, values, outward) for i in (0, 2))
    return Lines(low.lower_slope, low.lower_offset, high.upper_slope, high.upper_offset)


# elu is alpha (e^x - 1) below 0. The kink at 0, from slope alpha to 1, is concave for alpha > 1;
# for alpha < 0 the function is concave before it.


def _elu(eqn, values, outward):
    bends = jnp.where(values[1] < 0, 0.0, -jnp.inf), jnp.where(values[1] > 1, 0.0, jnp.inf)
    curve = Curve(lambda x, a: jnp.where(x > 0, 1.0, a * jnp.exp(jnp.minimum(x, 0))), bends)
    return curve(eqn, values, outward)


def _integer_pow(eqn, values, outward):
    n = eqn.params["y"]
    if abs(n) > 1024:  # the derivative's error would exceed that of a curve
        raise unsupported(eqn, "linear bound propagation", "use exponents up to 1024")
    bends = S_REVERSED if n % 2 else CONVEX
    return Curve(lambda x: n * lax.integer_pow(x, n - 1), bends)(eqn, values, outward)


def _pow(eqn, values, outward):
    """x^c on x >= 0: convex unless 0 < c < 1; and c^x, convex."""
    if _place(eqn) == 1:
        return Curve(lambda x, c: jnp.log(c) * jnp.power(c, x), CONVEX)(eqn, values, outward)
    c = values[1]
    start = jnp.where((c >= 1) | (c <= 0), -jnp.inf, jnp.inf)
    slope = _steep(lambda x, c: c * jnp.power(x, c - 1))
    return Curve(slope, (start, math.inf))(eqn, values, outward)


LINES.update(clamp=_clamp, elu=_elu, integer_pow=_integer_pow, pow=_pow)


# sin turns from concave to convex or back at k pi. A box no longer than pi lies within pi of the
# multiple that is nearest to its centre; to its right, sin is concave iff k is even. cos turns
# at (k + 1/2) pi and is convex to the right iff k is even. A longer box has no useful lines.


def _wave(slope: Callable[[Array], Array], turn: float, concave_after: int) -> Relax:
    def rule(eqn, values, outward):
        (x,) = values
        longest = 2.0 ** (jnp.finfo(x.lower.dtype).nmant // 2)
        far = jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper)) > longest
        bad = far | (x.upper - x.lower > math.pi)
        short = Box(jnp.where(bad, 0.0, x.lower), jnp.where(bad, 0.0, x.upper))
        centre = lax.stop_gradient(short.lower / 2 + short.upper / 2)
        k = jnp.round(centre / math.pi - turn)
        bend = (k + turn) * math.pi
        concave = k % 2 == concave_after
        bends = jnp.where(concave, -jnp.inf, bend), jnp.where(concave, bend, jnp.inf)
        found = Curve(slope, bends)(eqn, [short], outward)
        return jax.tree.map(lambda line: jnp.where(bad, jnp.nan, line), found)

    return rule


LINES["sin"] = _wave(jnp.cos, 0.0, 0)
LINES["cos"] = _wave(lambda x: -jnp.sin(x), 0.5, 1)
