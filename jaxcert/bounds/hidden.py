"""Linear bounds of one variable: unit rows pulled back, all of them or only those that matter.

Pulling r rows back for b examples holds coefficients of both signs on the widest variable behind,
2 r b m numbers; r is chosen so that they take up about 1 MiB on a CPU, where the cache is what
limits, and 256 MiB elsewhere. A feature map is bounded window by window instead (`windows.py`).
"""

import math

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import Form, entries, pull_back, unit_rows
from jaxcert.bounds.concretise import least
from jaxcert.bounds.geometry import geometry
from jaxcert.bounds.walk import Walk
from jaxcert.bounds.windows import bounds_by_window
from jaxcert.graph import Var
from jaxcert.sets import Array, Box


def refined(walk: Walk, v: Var, chunk: int | None = None) -> Box:
    """The box of v by pulling its unit rows back, a chunk of them at a time."""
    net = walk.net
    where = geometry(net, walk.planes, v)
    if where is not None:
        low, high = bounds_by_window(
            net, walk.planes, v, where, walk.region, walk.outward, walk.dtype
        )
        return with_dust(walk, Box(low, high))
    outer, inner = net.outer_and_inner(v)
    size = outer * inner
    chunk = chunk or _rows_that_fit(walk, v)

    def some(index: Array) -> tuple[Array, Array]:
        return concretised(walk, v, unit_rows(net, v, index, walk.dtype))

    if chunk >= size:
        low, high = some(jnp.arange(size))
    else:
        count = -(-size // chunk)
        index = jnp.minimum(jnp.arange(count * chunk), size - 1).reshape(count, chunk)
        low, high = (a.reshape(-1, net.batch)[:size] for a in jax.lax.map(some, index))
    return Box(entries(net, low, v), entries(net, high, v))


def concretised(walk: Walk, v: Var, form: Form) -> tuple[Array, Array]:
    """Lower and upper bounds (r, b) of mirrored rows on v."""
    rows, offset = pull_back(walk.net, walk.planes, v, form)
    values = least(walk.region, rows, walk.outward) + offset
    half = len(values) // 2
    low, high = values[:half], -values[half:]
    box = with_dust(walk, Box(low, high))
    return box.lower, box.upper


def with_dust(walk: Walk, box: Box) -> Box:
    if not walk.outward:
        return box
    return rounding.widen(Box(box.lower - walk.dust, box.upper + walk.dust), rounding.ARITHMETIC)


def _rows_that_fit(walk: Walk, v: Var) -> int:
    """Rows whose coefficients, of both signs and for all examples, take up about `_memory()` bytes."""
    widest = max(math.prod(w.shape) for w in walk.planes) if walk.planes else 1
    widest = max(widest, math.prod(walk.net.input.shape))
    return max(1, _memory() // (2 * widest * walk.dtype.itemsize))


def _memory() -> int:
    """Bytes of coefficients worked on at a time."""
    return 2**20 if jax.default_backend() == "cpu" else 2**28
