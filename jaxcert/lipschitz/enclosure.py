"""The value of a graph at a point, enclosed by the constants of its equations."""

from typing import Any

import jax.numpy as jnp

from jaxcert.blocks import REFERENCES
from jaxcert.bounds.interpreter import Value, apply_rule, operand, output
from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.graph import Equation, Var
from jaxcert.lipschitz.chain import Factors, centre, change
from jaxcert.rows import Rows
from jaxcert.sets import Array, Box
from jaxcert.tracing import Traced


def enclosed(
    traced: Traced, constants: Factors, values: dict[Var, Value], x: Box, norm: float
) -> Box:
    """The output of a float64 graph at points x (b, ...), known up to a box, as a box.

    Intervals alone grow with the absolute row sums of each layer, far beyond its constant: after
    twenty layers nothing is left. So each equation is evaluated at a point, its interval rule tells
    how much that rounds, and what was off before grows by the equation's constant.
    """
    graph, rows = traced
    batch = graph.inputs[0].shape[0]

    def length(off: Array, v: Var) -> Array:
        return _length(_by_example(off, rows[v], batch), norm)

    (start,), (point, apart) = graph.inputs, centre(x)
    points, off = {start: point}, {start: length(apart, start)}
    for eqn in graph.equations:
        if not eqn.bounded:
            continue
        grown = change(eqn, off, constants, norm)
        at = [
            Box(points[a], points[a])
            if isinstance(a, Var) and a.bounded
            else operand(values, a, True)
            for a in eqn.inputs
        ]
        for out, box in zip(eqn.outputs, _intervals(eqn, at), strict=True):
            points[out], apart = centre(box)
            off[out] = (grown + length(apart, out)) * (1 + 8 * UNIT) + TINY
    out = graph.outputs[0]
    if not (isinstance(out, Var) and out.bounded):
        value = operand(values, out, True)
        return value if isinstance(value, Box) else Box(value, value)
    size = jnp.abs(points[out])
    slack = off[out].reshape(-1, *(1,) * (size.ndim - 1)) + 4 * UNIT * size
    return Box(points[out] - slack, points[out] + slack)


def _intervals(eqn: Equation, at: list[Value]) -> Any:
    """The outputs of an equation, or of a block's equations, as boxes."""
    if eqn.name in REFERENCES and eqn.inner is not None:
        return [output(eqn.inner, at, outward=True)]
    return apply_rule(eqn, at, True)


def _by_example(off: Array, place: Rows, batch: int) -> Array:
    """Entries with those of each example in one row, (b, n)."""
    if batch == 1:
        return off.reshape(1, -1)
    before, merged, after = (
        off.shape[: place.axis],
        off.shape[place.axis],
        off.shape[place.axis + 1 :],
    )
    split = (*before, place.outer, batch, merged // (place.outer * batch), *after)
    return jnp.moveaxis(off.reshape(split), place.axis + 1, 0).reshape(batch, -1)


def _length(off: Array, norm: float) -> Array:
    """Norms of the entries (b, n) of each example, rounded up."""
    if norm == 2:
        length = jnp.sqrt(jnp.sum(off**2, axis=1))
        n = off.shape[1]
        return length * (1 + (n + 8) * UNIT) + n * 2.0**-510  # squares that vanish
    return jnp.max(off, axis=1)
