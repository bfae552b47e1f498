"""Every equation between two affine functions of its bounded operands: the table of linear rules.

    apply(lower, *xs) + below  <=  y  <=  apply(upper, *xs) + above        on the operands' boxes.

An affine equation is its own plane, above and below; its transpose comes from JAX, so that nothing
is written by hand here but which of its operands are weights. A nonlinear function of one operand
has two lines (`relaxations.py`); functions of several operands have planes of their own, below.

Rounding is counted by moving `below` and `above` apart (`residual.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.interpreter import RULES, Value, lower, upper
from jaxcert.bounds.products import exact_products
from jaxcert.bounds.relaxations import LINES, lines
from jaxcert.graph import Equation, Var, holds_all, unsupported
from jaxcert.sets import Array, Box


@dataclasses.dataclass(frozen=True)
class Planes:
    """Affine functions below and above one output of an equation.

    Attributes:
      operands: the bounded variables they are functions of.
      apply: (weight, *xs) -> the linear part; weights are pytrees, and apply(|weight|, *|xs|)
        bounds the sum of the sizes of all products in it.
      lower, upper: the weights; the same object where the linear parts are equal.
      below, above: the offsets, or None for zero.
    """

    operands: tuple[Var, ...]
    apply: Callable[..., Array]
    lower: Any
    upper: Any
    below: Array | None = None
    above: Array | None = None
    elementwise: bool = False  # the weights are factors of the operand's entries

    @property
    def affine(self) -> bool:
        """Whether both linear parts are the same."""
        return self.lower is self.upper


Rule: TypeAlias = Callable[[Equation, Sequence[Value], bool], list[Planes]]
"""(equation, operands, outward) -> planes per output, before their own rounding is counted."""

PLANES: dict[str, Rule] = {}


def planes_of(eqn: Equation, values: Sequence[Value], outward: bool) -> list[Planes]:
    """Planes around each output of an equation, given the boxes of its operands."""
    if eqn.name in PLANES:
        return PLANES[eqn.name](eqn, values, outward)
    if eqn.name in LINES:
        return _from_lines(eqn, values, outward)
    if eqn.name in CONSTANT:
        return constant(eqn, values, outward)
    hint = (
        "use ibp, or register planes for it: "
        f"jaxcert.bounds.register('{eqn.name}', rule, planes=jaxcert.bounds.planes.constant)"
    )
    raise unsupported(eqn, "linear bound propagation", hint)


def is_affine(eqn: Equation) -> bool:
    """Whether an equation is affine in its bounded operands, whatever their boxes."""
    if eqn.name in _SCALES:
        return len(_bounded(eqn)) == 1 and (eqn.name != "div" or _bounded(eqn)[0] == 0)
    if eqn.name == "select_n":
        return not _is_bounded(eqn.inputs[0])
    return eqn.name in ONE_TERM and eqn.inputs[0].dtype != jnp.bool_


def _is_bounded(atom: Any) -> bool:
    return isinstance(atom, Var) and atom.bounded


def _bounded(eqn: Equation) -> list[int]:
    return [i for i, atom in enumerate(eqn.inputs) if _is_bounded(atom)]


def _operands(eqn: Equation) -> tuple[Var, ...]:
    return tuple(eqn.inputs[i] for i in _bounded(eqn))  # type: ignore[misc]


# --- Affine equations -----------------------------------------------------------------------------

# Entries move, or are added up; further operands are indices.
_MOVES = frozenset(
    """
    reshape squeeze broadcast_in_dim transpose slice dynamic_slice rev gather tile split
    unstack stop_gradient copy reduce_sum reduce_window_sum cumsum convert_element_type
    reduce_precision
    """.split()
)
_SUMS = frozenset("add sub neg".split())  # constants are terms
_JOINS = frozenset("select_n concatenate stack pad".split())  # constants are entries
_SCALES = frozenset("mul div dot_general conv_general_dilated".split())  # constants are factors
ONE_TERM = _MOVES | _SUMS | _JOINS  # rows are moved, and added up only by further readers
EXACT = ONE_TERM - {"reduce_sum", "reduce_window_sum", "cumsum", "add", "sub"}  # nothing is rounded
_CASTS = frozenset("convert_element_type reduce_precision stop_gradient copy".split())


def _with_operands(eqn: Equation, constants: Sequence[Any], xs: Sequence[Array]) -> list[Any]:
    """The equation's operands: xs in the bounded places, constants elsewhere."""
    given = iter(xs)
    return [
        next(given) if _is_bounded(a) else c for a, c in zip(eqn.inputs, constants, strict=True)
    ]


def _move(eqn, values, outward):
    if eqn.inputs[0].dtype == jnp.bool_:
        return constant(eqn, values, outward)
    if eqn.name in _CASTS:
        return [_cast(eqn, values, outward)]

    def apply(k, _, x):
        return eqn.bind(*_with_operands(eqn, values, [x]))[k]

    outputs = range(len(eqn.outputs))
    return [_linear(eqn, functools.partial(apply, k), ()) for k in outputs]


def _cast(eqn, values, outward):
    """The identity; in a proof, a cast to a narrower type is off by that type's roundoff."""
    plane = _linear(eqn, lambda _, x: x, ())
    (x,) = values
    to, source = jnp.dtype(eqn.outputs[0].dtype), jnp.dtype(eqn.inputs[0].dtype)
    if (
        eqn.name in ("stop_gradient", "copy")
        or not outward
        or (eqn.name == "convert_element_type" and holds_all(to, source))
    ):
        return plane
    (box,) = _boxes(eqn, values, outward)
    error = jnp.maximum(upper(box) - upper(x), lower(x) - lower(box))
    error = rounding.inflate(jnp.maximum(error, 0), 1)
    return dataclasses.replace(plane, below=-error, above=error)


def _add(eqn, values, outward):
    signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "neg": (-1.0,)}[eqn.name]

    def apply(weights, *xs):
        return functools.reduce(jnp.add, [w * x for w, x in zip(weights, xs, strict=True)])

    plane = _linear(eqn, apply, tuple(signs[i] for i in _bounded(eqn)))
    return [_with_offset(eqn, plane, values, outward)]


def _join(eqn, values, outward):
    """Entries side by side, constants among them, which are zero in the linear part."""
    if eqn.name == "select_n" and isinstance(values[0], Box):
        return [_choice(eqn, values, outward)]
    first = 1 if eqn.name == "select_n" else 0  # its predicate is no term

    def apply(_, *xs):
        zeros = [
            v if i < first else jnp.zeros(jnp.shape(lower(v)), xs[0].dtype)
            for i, v in enumerate(values)
        ]
        return eqn.bind(*_with_operands(eqn, zeros, xs))[0]

    return [_with_offset(eqn, _linear(eqn, apply, ()), values, outward)]


def _with_offset(eqn: Equation, plane: Planes, values: Sequence[Value], outward: bool) -> Planes:
    """The planes with the equation's value where its bounded operands are zero."""
    if len(_bounded(eqn)) == len(eqn.inputs):
        return plane
    at_zero = [
        jnp.zeros_like(lower(v)) if _is_bounded(a) else v
        for a, v in zip(eqn.inputs, values, strict=True)
    ]
    if not outward and not any(isinstance(v, Box) for v in at_zero):
        offset = eqn.bind(*at_zero)[0]
        return dataclasses.replace(plane, below=offset, above=offset)
    (box,) = _boxes(eqn, at_zero, outward)
    return dataclasses.replace(plane, below=lower(box), above=upper(box))


def _scale(eqn, values, outward):
    places = _bounded(eqn)
    if len(places) == 2:
        return [_product(eqn, values, outward)]
    if eqn.name == "div":
        if places == [1]:
            raise AssertionError("quotients by bounded values are expanded before")
        one = jnp.ones((), lower(values[0]).dtype)
        (weight,) = _boxes(eqn, [one, values[1]], outward) if outward else [one / values[1]]
        bind = jnp.multiply
    else:
        weight = values[1 - places[0]]
        bind = _product_of(eqn)
    swapped = eqn.name != "div" and places == [1]

    def apply(w, x):
        return bind(w, x) if swapped else bind(x, w)

    plane = _linear(eqn, apply, weight)
    return [dataclasses.replace(plane, elementwise=eqn.name in ("mul", "div"))]


def _product_of(eqn: Equation) -> Callable[[Array, Array], Array]:
    options = {} if eqn.name in ("mul", "div") else exact_products(True)
    return lambda x, y: eqn.bind(x, y, **options)[0]


def absolute(weight: Any) -> Any:
    """The sizes of all arrays of a weight."""
    return jax.tree.map(jnp.abs, weight)


def _linear(eqn: Equation, apply: Callable[..., Array], weight: Any) -> Planes:
    return Planes(_operands(eqn), apply, weight, weight)


def _boxes(eqn: Equation, values: Sequence[Value], outward: bool) -> list[Box]:
    result = RULES[eqn.name](eqn, values, outward)
    return result if isinstance(result, list) else [result]


# --- Nonlinear equations --------------------------------------------------------------------------


def _from_lines(eqn, values, outward):
    found = lines(eqn, values, outward)
    return [
        Planes(
            _operands(eqn),
            jnp.multiply,
            found.lower_slope,
            found.upper_slope,
            found.lower_offset,
            found.upper_offset,
            elementwise=True,
        )
    ]


# Steps, order statistics and the like: no line is better than the ends of their range.
CONSTANT = frozenset(
    """
    sign floor ceil round sort cummax cummin erf_inv lt le gt ge eq ne not and or is_finite
    reduce_and reduce_or
    """.split()
)


def constant(eqn: Equation, values: Sequence[Value], outward: bool) -> list[Planes]:
    """The ends of the interval rule's box as planes without a slope."""
    return [
        Planes((), lambda _: jnp.zeros(()), (), (), lower(box), upper(box))
        for box in _boxes(eqn, values, outward)
    ]


def _choice(eqn, values, outward):
    """where(p, yes, no) with a bounded p: the chosen case where sure, else the ends of the hull."""
    which, no, yes = values
    sure = (~upper(which), lower(which))
    unsure = ~(sure[0] | sure[1])
    (hull,) = _boxes(eqn, values, outward)
    dtype = lower(hull).dtype
    places = [i for i in _bounded(eqn) if i > 0]
    weights = tuple(sure[i - 1].astype(dtype) for i in places)
    below, above = jnp.where(unsure, lower(hull), 0.0), jnp.where(unsure, upper(hull), 0.0)
    for case, known in ((no, sure[0]), (yes, sure[1])):
        if not any(values[i] is case for i in places):
            below, above = (
                jnp.where(known, lower(case), below),
                jnp.where(known, upper(case), above),
            )

    def apply(weights, *xs):
        start = jnp.zeros((), xs[0].dtype if xs else dtype)
        return functools.reduce(jnp.add, [w * x for w, x in zip(weights, xs, strict=True)], start)

    operands = tuple(eqn.inputs[i] for i in places)
    return Planes(operands, apply, weights, weights, below, above)


# The product of two bounded numbers (McCormick, Mathematical Programming 1976): from
# (x - p)(y - q) >= 0 at a pair of lower or of upper ends, and <= 0 at a mixed pair,
#     x y >= q x + p y - p q   for (p, q) = (l_x, l_y) or (u_x, u_y),
#     x y <= q x + p y - p q   for (p, q) = (l_x, u_y) or (u_x, l_y).
# Both choices leave the same gap at the centre, so that one is taken whose least (greatest) value
# over the box is better. In a dot product the choice is made once for each entry of x, for the sum
# over all entries of y that it meets: then the planes are themselves dot products.


def _product(eqn, values, outward):
    x, y = values
    bind = _product_of(eqn)
    (lx, ux), (ly, uy) = (x.lower, x.upper), (y.lower, y.upper)
    ones = jnp.ones(eqn.outputs[0].shape, lx.dtype)

    struct = jax.ShapeDtypeStruct(lx.shape, lx.dtype)

    def over(q):  # for each entry of x, the sum of the entries of q that it is multiplied by
        return jax.linear_transpose(lambda z: bind(z, q), struct)(ones)[0]

    def least(p, q):  # of q x + p y - p q over the box, summed
        slope = lx * over(jnp.maximum(q, 0)) + ux * over(jnp.minimum(q, 0))
        other = jnp.maximum(p, 0) * over(ly) + jnp.minimum(p, 0) * over(uy)
        return slope + other - p * over(q)

    def most(p, q):
        slope = ux * over(jnp.maximum(q, 0)) + lx * over(jnp.minimum(q, 0))
        other = jnp.maximum(p, 0) * over(uy) + jnp.minimum(p, 0) * over(ly)
        return slope + other - p * over(q)

    below = jax.lax.stop_gradient(least(lx, ly) >= least(ux, uy))
    above = jax.lax.stop_gradient(most(lx, uy) <= most(ux, ly))

    def weight(first, p1, q1, p2, q2):
        mask = first.astype(lx.dtype)
        return mask, 1 - mask, q1, q2, jnp.where(first, p1, p2)

    low, high = weight(below, lx, ly, ux, uy), weight(above, lx, uy, ux, ly)

    def apply(weight, x, y):
        first, second, q1, q2, p = weight
        return bind(first * x, q1) + bind(second * x, q2) + bind(p, y)

    def offset(weight, outward_sign):
        first, second, q1, q2, p = weight
        value = -(bind(first * p, q1) + bind(second * p, q2))
        if not outward:
            return value
        size = bind(jnp.abs(first * p), jnp.abs(q1)) + bind(jnp.abs(second * p), jnp.abs(q2))
        n = 2 * math.prod(lx.shape) // max(1, lx.shape[0]) + 4
        return value + outward_sign * rounding.inflate(size * rounding.gamma(n), n)

    return Planes(_operands(eqn), apply, low, high, offset(low, -1), offset(high, 1))


# max_j x_j over k entries. With m = max_j l_j, every entry obeys x_j <= m + relu(x_j - m), so
#     max_j x_j <= m + sum_j relu(x_j - m) <= m + sum_j s_j (x_j - l_j),
# the chord of each relu on [l_j, u_j]; where that is worse at the centre, the constant max_j u_j.
# Below, the one entry with the largest centre.


def _largest(eqn, values, outward):
    (x,) = values
    axes = tuple(eqn.params["axes"])
    l, u = x.lower, x.upper
    m = jnp.max(l, axes, keepdims=True)
    top = jnp.max(u, axes, keepdims=True)
    rises = u > m
    slope = jnp.where(rises, jnp.where(l >= m, 1.0, (u - m) / jnp.where(u > l, u - l, 1.0)), 0.0)
    at_lower = -slope * jnp.where(rises, l, 0.0)
    chord = jnp.where(rises, jnp.maximum(at_lower, (u - m) - slope * u), 0.0)
    chords = m + jnp.sum(chord, axes, keepdims=True)
    centre = l / 2 + u / 2
    at_centre = chords + jnp.sum(slope * jnp.where(rises, centre, 0.0), axes, keepdims=True)
    use = jax.lax.stop_gradient(at_centre < top)
    if outward:
        size = jnp.where(rises, jnp.abs(slope * l) + jnp.abs(u) * (1 + slope) + jnp.abs(m), 0.0)
        n = math.prod(l.shape[a] for a in axes) + 8
        error = jnp.abs(m) + jnp.sum(size, axes, keepdims=True)
        chords = chords + rounding.inflate(error * rounding.gamma(4 * n), n)
    above = jnp.squeeze(jnp.where(use, chords, top), axes)
    weight = jnp.where(use, slope, 0.0)
    chosen = jax.lax.stop_gradient(_one_of(centre == jnp.max(centre, axes, keepdims=True), axes))

    def apply(w, x):
        return jnp.sum(w * x, axes)

    return [Planes(_operands(eqn), apply, chosen.astype(l.dtype), weight, 0 * above, above, True)]


def _one_of(candidates: Array, axes: Sequence[int]) -> Array:
    """The first candidate along the axes."""
    earlier = candidates.astype(jnp.int32)
    moved = jnp.moveaxis(earlier, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    first = (flat == 1) & (jax.lax.cumsum(flat, flat.ndim - 1) == 1)
    return jnp.moveaxis(first.reshape(moved.shape), range(-len(axes), 0), axes)


PLANES.update(dict.fromkeys(_MOVES, _move))
PLANES.update(dict.fromkeys(_SUMS, _add))
PLANES.update(dict.fromkeys(_JOINS, _join))
PLANES.update(dict.fromkeys(_SCALES, _scale))
PLANES["reduce_max"] = _largest
