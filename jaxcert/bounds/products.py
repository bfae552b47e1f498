"""Interval rules for dots and convolutions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxcert.bounds import rounding
from jaxcert.bounds.interpreter import Value, define, lower, upper
from jaxcert.graph import Equation, Var
from jaxcert.sets import Array, Box


def exact_products(outward: bool) -> dict[str, Any]:
    """Parameters under which a dot or convolution uses no reduced-precision multiplications.

    In a proof both operands are float64 and the result takes their type: a type written out would
    be truncated if a transformation replayed the equation outside of the float64 block.
    """
    if outward:
        return {"precision": lax.Precision.HIGHEST, "preferred_element_type": None}
    return {"precision": lax.Precision.HIGHEST}


def affine(
    apply: Callable[[Array, Array], Array], x: Value, weight: Value, n: int, outward: bool
) -> Box:
    """The range of a bilinear map of a boxed operand and a weight, n products per output.

    In centre and radius form (Rump, "Fast and parallel interval arithmetic", BIT 1999),
        W (c +- r) = W c +- |W| r,
    two products instead of four, and exact for an exact W. A weight that is itself rounded,
    W +- E, adds E (|c| + r). The rounding of W c, at most gamma_n |W| |c|, joins the radius before
    it is multiplied, so a proof costs two products as well.
    """
    centre = lower(x) / 2 + upper(x) / 2
    radius = upper(x) / 2 - lower(x) / 2
    if not outward:
        middle, spread = apply(centre, weight), apply(radius, jnp.abs(weight))
        return Box(middle - spread, middle + spread)
    radius = jnp.maximum(upper(x) - centre, centre - lower(x))
    radius = rounding.inflate(radius + rounding.gamma(n) * jnp.abs(centre), 1)
    if isinstance(weight, Box):
        middle_weight = weight.lower / 2 + weight.upper / 2
        error = jnp.maximum(weight.upper - middle_weight, middle_weight - weight.lower)
        error = rounding.inflate(error, 1)
        spread = apply(jnp.abs(centre) + radius, error) * (1 + rounding.gamma(4))
    else:
        middle_weight, spread = weight, 0.0
    middle = apply(centre, middle_weight)
    spread = rounding.inflate(spread + apply(radius, jnp.abs(middle_weight)), n)
    return rounding.widen(Box(middle - spread, middle + spread), rounding.ARITHMETIC)


def _multiply_bounded(eqn: Equation, x: Value, y: Value, outward: bool) -> Box:
    """dot_general of two bounded operands: the sum of the exact ranges of its products.

    The ranges need the products one by one; they are formed for a block of the contracted axis at a
    time, so that at most 2^20 numbers (or one slice) exist at once.
    """
    (contract, pairs) = eqn.params["dimension_numbers"]
    x, y = (_as_matrices(v, contract[i], pairs[i], i) for i, v in enumerate((x, y)))
    batch, rows, terms = lower(x).shape
    columns = lower(y).shape[2]
    block = min(max(1, 2**20 // max(batch * rows * columns, 1)), max(terms, 1))
    count = -(-terms // block)

    def blocks(a, axis):  # zeros fill the last block: their products are exactly zero
        widths = [(0, 0)] * 3
        widths[axis] = (0, count * block - terms)
        a = jnp.pad(a, widths)
        shape = (*a.shape[:axis], count, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    def step(total, ends):
        xl, xu, yl, yu = ends
        corners = [a[..., None] * b[:, None] for a in (xl, xu) for b in (yl, yu)]
        low, high = (functools.reduce(f, corners) for f in (jnp.minimum, jnp.maximum))
        size = jnp.maximum(jnp.abs(low), jnp.abs(high))
        return tuple(t + v.sum(2) for t, v in zip(total, (low, high, size), strict=True)), None

    zero = jnp.zeros((batch, rows, columns), lower(x).dtype)
    ends = (blocks(lower(x), 2), blocks(upper(x), 2), blocks(lower(y), 1), blocks(upper(y), 1))
    (low, high, size), _ = lax.scan(step, (zero, zero, zero), ends)
    if outward:
        error = rounding.inflate(size * rounding.gamma(terms + 1), terms + 1)
        low, high = low - error, high + error
    shape = eqn.outputs[0].shape
    box = Box(low.reshape(shape), high.reshape(shape))
    return rounding.widen(box, rounding.ARITHMETIC) if outward else box


def _as_matrices(value: Value, contract: Sequence[int], pairs: Sequence[int], side: int) -> Box:
    """An operand of a dot as (batch, free, contracted) on the left, (batch, contracted, free) on
    the right."""

    def reorder(a):
        free = [i for i in range(a.ndim) if i not in contract and i not in pairs]
        order = [*pairs, *free, *contract] if side == 0 else [*pairs, *contract, *free]
        sizes = [math.prod(a.shape[i] for i in axes) for axes in (pairs, free, contract)]
        shape = sizes if side == 0 else [sizes[0], sizes[2], sizes[1]]
        return a.transpose(order).reshape(shape)

    return Box(reorder(lower(value)), reorder(upper(value)))


def _dot_general(eqn, values, outward):
    x, y = values
    (contract, _) = eqn.params["dimension_numbers"]
    if all(isinstance(a, Var) and a.bounded for a in eqn.inputs):
        return _multiply_bounded(eqn, x, y, outward)
    n = math.prod(eqn.inputs[0].shape[i] for i in contract[0])
    options = exact_products(outward)
    if isinstance(eqn.inputs[1], Var) and eqn.inputs[1].bounded:
        return affine(lambda b, w: eqn.bind(w, b, **options)[0], y, x, n, outward)
    return affine(lambda b, w: eqn.bind(b, w, **options)[0], x, y, n, outward)


def _conv(eqn, values, outward):
    x, kernel = values
    spec = eqn.params["dimension_numbers"].rhs_spec
    n = math.prod(eqn.inputs[1].shape) // eqn.inputs[1].shape[spec[0]]
    options = exact_products(outward)
    return affine(lambda b, w: eqn.bind(b, w, **options)[0], x, kernel, n, outward)


define("dot_general", _dot_general)
define("conv_general_dilated", _conv)
