"""Linear bounds of one variable: unit rows pulled back, all of them or only those that matter.

Pulling r rows back for b examples holds coefficients of both signs on the widest variable behind,
2 r b m numbers; r is chosen so that they take up about 1 MiB on a CPU, where the cache is what
limits, and 256 MiB elsewhere. A feature map is bounded window by window instead (`windows.py`).
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import (
    Form,
    ancestors,
    entries,
    memory,
    pull_back_together,
    unit_rows,
)
from jaxcert.bounds.concretise import least
from jaxcert.bounds.geometry import geometry
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.walk import Walk
from jaxcert.bounds.windows import bounds_by_window
from jaxcert.graph import Var
from jaxcert.sets import Array, Box


def refined(
    walk: Walk, v: Var, chunk: int | None = None, planes: Mapping[Var, Planes] | None = None
) -> Box:
    """The box of v by pulling its unit rows back, a chunk of them at a time.

    Args:
      walk: up to v.
      v: the variable.
      chunk: rows at a time; by default as many as fit.
      planes: others than the walk's own.
    """
    net = walk.net
    planes = walk.planes if planes is None else planes
    where = geometry(net, planes, v)
    if where is not None:
        low, high = bounds_by_window(
            net, planes, v, where, walk.around, walk.outward, walk.rows_dtype
        )
        box = Box(low, high)
        if v in walk.centres:
            box = rounding.widen(box, rounding.ARITHMETIC)
            box = Box(box.lower + walk.centres[v], box.upper + walk.centres[v])
        return with_dust(walk, box, net.spread(walk.dust, v))
    index = jnp.arange(math.prod(net.outer_and_inner(v)))
    low, high = _in_chunks(walk, v, index, chunk, planes)
    return Box(entries(net, low, v), entries(net, high, v))


def refined_where_unsure(walk: Walk, v: Var, count: int, chunk: int | None = None) -> Box:
    """The box of v with `count` of its entries refined for each example: the least decided ones.

    Those are the entries that reach furthest to both sides of zero, where relus have their kink.
    """
    if count >= math.prod(walk.net.outer_and_inner(v)):
        return refined(walk, v, chunk)
    index = least_decided(walk, v, count)
    return replaced(walk, v, index, _in_chunks(walk, v, index, chunk, walk.planes))


def least_decided(walk: Walk, v: Var, count: int) -> Array:
    """The entries of v that reach furthest to both sides of zero, (count, b)."""
    box = walk.boxes[v]
    low, high = walk.net.flat(box.lower, v), walk.net.flat(box.upper, v)
    _, index = jax.lax.top_k(jnp.minimum(-low, high), count)
    return index.T


def replaced(walk: Walk, v: Var, index: Array, ends: tuple[Array, Array]) -> Box:
    """The box of v with other ends (n, b) for the entries `index`, (n, b)."""
    net, box, each = walk.net, walk.boxes[v], jnp.arange(walk.net.batch)[:, None]
    low, high = (
        net.shaped(net.flat(end, v).at[each, index.T].set(better.T), v)
        for end, better in zip((box.lower, box.upper), ends, strict=True)
    )
    return Box(low, high)


def _in_chunks(
    walk: Walk, v: Var, index: Array, chunk: int | None, planes: Mapping[Var, Planes]
) -> tuple[Array, Array]:
    """Bounds (n, b) of the entries `index` of v, (n,) or one list per example (n, b)."""
    size = len(index)
    # At least two chunks: in a loop the planes are given, while a single one would be fused with
    # their making, which XLA:CPU then repeats for every row.
    chunk = chunk or min(rows_that_fit(walk, v), -(-size // 2))

    def some(index: Array) -> tuple[Array, Array]:
        return concretised(walk, v, unit_rows(walk.net, v, index, walk.rows_dtype), planes)

    if chunk >= size:
        return some(index)
    count = -(-size // chunk)
    padded = index[jnp.minimum(jnp.arange(count * chunk), size - 1)]
    low, high = jax.lax.map(some, padded.reshape(count, chunk, *index.shape[1:]))
    return low.reshape(-1, walk.net.batch)[:size], high.reshape(-1, walk.net.batch)[:size]


def concretised(
    walk: Walk, v: Var, form: Form, planes: Mapping[Var, Planes]
) -> tuple[Array, Array]:
    """Lower and upper bounds (r, b) of mirrored rows on v."""
    values = least_values(walk, v, form, planes)
    half = len(values) // 2
    box = with_dust(walk, Box(values[:half], -values[half:]), walk.dust)
    return box.lower, box.upper


def least_values(walk: Walk, v: Var, form: Form, planes: Mapping[Var, Planes]) -> Array:
    """Lower bounds (2 r, b) of mirrored rows on v and of their negatives; without the dust."""
    (values,) = least_values_together(walk, {v: form}, planes)
    return values


def least_values_together(
    walk: Walk, forms: Mapping[Var, Form], planes: Mapping[Var, Planes]
) -> list[Array]:
    """`least_values` of the rows on several variables, in one backward pass."""
    rows, offset = pull_back_together(walk.net, planes, forms)
    values, found = least(walk.around, rows, walk.outward) + offset, {}
    for v in (*ancestors(walk.net, planes, *forms), walk.net.input):
        if v in forms:
            found[v], values = jnp.split(values, [forms[v].count])
    return [walk.from_centre(v, form, found[v]) for v, form in forms.items()]


def with_dust(walk: Walk, box: Box, dust: Array) -> Box:
    """The box grown, in a proof, by what products that were flushed to zero can amount to."""
    if not walk.outward:
        return box
    return rounding.widen(Box(box.lower - dust, box.upper + dust), rounding.ARITHMETIC)


def rows_that_fit(walk: Walk, v: Var) -> int:
    """Rows whose coefficients, of both signs for all examples, take up about `memory()` bytes."""
    widest = max(math.prod(w.shape) for w in walk.planes) if walk.planes else 1
    widest = max(widest, math.prod(walk.net.input.shape))
    return max(1, memory() // (2 * widest * walk.rows_dtype.itemsize))
