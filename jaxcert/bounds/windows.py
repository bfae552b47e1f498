"""Hidden bounds of feature maps by receptive-field cropping.

One position of a map is the output of a tiny net on a window of the input, with the same weights
and with the planes cropped to that window: the backward pass of `backward.py`, on windows. All
positions of all examples are mapped over, some at a time. Nothing is approximated: the bounds are
those of the dense pass, which spends its time on zeros outside of the windows.

Where a window reaches over the edge of a map, its entries out there do not exist. Padding would
make the transpose of a convolution give them coefficients, which are set to zero before anything
else reads them: off the map all rows are zero, so whatever is cropped out there does not matter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcert.bounds import convolution
from jaxcert.bounds.backward import RESHAPES, Net, ancestors, facing, memory, on_offsets
from jaxcert.bounds.concretise import box_of, least
from jaxcert.bounds.geometry import Geometry, Span, Window, sizes
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.products import exact_products
from jaxcert.graph import Equation, Var
from jaxcert.sets import Array, Box, InputSet, LinfBall, per_example


def bounds_by_window(
    net: Net,
    planes: Mapping[Var, Planes],
    start: Var,
    where: Geometry,
    region: InputSet,
    outward: bool,
    dtype: Any,
) -> tuple[Array, Array]:
    """Lower and upper bounds of every entry of `start`, each in start's shape."""
    steps = [v for v in ancestors(net, planes, start) if v in where.windows]
    region = _spread_out(region, outward) if net.input in where.windows else region
    crops = _crops_of(net, planes, steps, where, region, dtype)
    window = where.windows[start]
    count = math.prod(sizes(window))
    # Behind a barrier, or XLA convolves these known rows with known kernels when compiling.
    unit = lax.optimization_barrier(jnp.eye(count, dtype=dtype).reshape(count, *sizes(window)))

    def one(position: Array) -> Array:
        here = crops.at(position)

        def on_the_map(v, rows):
            mask = here.get((v, "on the map"))
            return rows if mask is None else rows * mask

        offset = jnp.zeros((2 * count,), dtype)
        rows_of, mirrored = {start: unit}, {start: True}
        for v in steps:
            rows, single, plane = on_the_map(v, rows_of.pop(v)), mirrored.pop(v), planes[v]
            if single and not plane.affine:
                rows, single = jnp.concatenate([rows, -rows]), False
            offset = offset + _offsets(here.get((v, "below")), here.get((v, "above")), rows, single)
            parts = _transposed(net, where, v, plane, here, rows)
            for i, (x, part) in enumerate(zip(plane.operands, parts, strict=True)):
                part = _embedded(part, where.edges[v, i], where.windows[x], x.shape, position)
                rows_of[x], mirrored[x] = _added(rows_of, mirrored, x, part, single)
        if net.input not in rows_of:
            return offset
        rows = on_the_map(net.input, rows_of[net.input])
        rows = jnp.concatenate([rows, -rows]) if mirrored[net.input] else rows
        structure = jax.tree.structure(region)
        leaves = [here[net.input, i] for i in range(structure.num_leaves)]
        nearby = _one_example(jax.tree.unflatten(structure, leaves))
        return least(nearby, rows, outward)[:, 0] + offset

    widest = max(math.prod(sizes(w)) for w in where.windows.values())
    values = _mapped(one, where, 2 * count * widest * unit.dtype.itemsize)
    low, negated = _as_maps(values.reshape(*where.grid, 2, *sizes(window)), where, start)
    return low, -negated


def _as_maps(values: Array, where: Geometry, start: Var) -> Array:
    """Values (*grid, 2, *window) of each sign in start's own order of axes."""
    front = len(where.grid)
    values = jnp.squeeze(values, [front + 1 + axis for axis in where.axes])
    order = [*where.axes, *(i for i in range(len(start.shape)) if i not in where.axes)]
    back = [order.index(i) for i in range(len(order))]
    return jnp.moveaxis(values, front, 0).transpose(0, *(1 + i for i in back))


def _mapped(one: Any, where: Geometry, bytes_each: int) -> Array:
    """one(position) for all positions, as many at a time as fit."""
    index = jnp.stack(
        [i.reshape(-1) for i in jnp.meshgrid(*map(jnp.arange, where.grid), indexing="ij")], -1
    )
    total = len(index)
    chunk = max(1, min(total, memory() // bytes_each))
    steps = -(-total // chunk)
    if steps == 1:
        return jax.vmap(one)(index)
    chunk = -(-total // steps)
    padded = index[jnp.minimum(jnp.arange(steps * chunk), total - 1)]
    values = lax.map(jax.vmap(one), padded.reshape(steps, chunk, -1))
    return values.reshape(steps * chunk, -1)[:total]


# --- Crops ----------------------------------------------------------------------------------------


class _Crops:
    """Arrays, padded so that their windows lie inside of them at every position of the grid.

    Arrays of one shape and window are stacked, because cutting is what takes time.
    """

    def __init__(self, where: Geometry):
        self.where = where
        self._parts: dict[Any, list[tuple[Any, Array]]] = {}
        self._stacks: list[tuple[list[Any], Window, Array]] = []

    def add(self, key: Any, v: Var, array: Any, window: Window | None = None) -> None:
        """Have `key` stand for the part of an array that is in v's window."""
        window = window or self.where.windows[v]
        array = jnp.asarray(array)
        array = array.reshape((1,) * (len(window) - array.ndim) + array.shape)
        # An axis of size 1 may stand for any size: then it is not cut, and the span stands still.
        pairs = zip(window, array.shape, v.shape, strict=True)
        window = tuple(Span(0, 1) if m == 1 != size else s for s, m, size in pairs)
        self._parts.setdefault((window, array.shape, array.dtype), []).append((key, array))

    def close(self) -> None:
        """Pad and stack what was added."""
        for (window, shape, _), parts in self._parts.items():
            pads, moved = [(0, 0, 0)], []
            for span, m in zip(window, shape, strict=True):
                if span.axis is None:
                    pads.append((0, 0, 0))
                    moved.append(Span(0, m))
                    continue
                low = max(0, -span.start)
                end = (self.where.grid[span.axis] - 1) * span.stride + span.start + span.size
                pads.append((low, max(0, end - m), 0))
                moved.append(dataclasses.replace(span, start=span.start + low))
            stack = lax.concatenate([array[None] for _, array in parts], 0)
            stack = lax.pad(stack, jnp.zeros((), stack.dtype), pads)
            self._stacks.append(([key for key, _ in parts], tuple(moved), stack))

    def at(self, position: Array) -> dict[Any, Array]:
        """The parts in the windows at a position of the grid."""
        zero, found = jnp.zeros((), position.dtype), {}
        for keys, window, stack in self._stacks:
            starts = [zero if s.axis is None else position[s.axis] * s.stride + s.start
                      for s in window]  # fmt: skip
            if not all(s.axis is None for s in window):
                stack = lax.dynamic_slice(stack, [zero, *starts], (len(keys), *sizes(window)))
            found.update({key: stack[i] for i, key in enumerate(keys)})
        return found


def _crops_of(
    net: Net,
    planes: Mapping[Var, Planes],
    steps: Sequence[Var],
    where: Geometry,
    region: InputSet,
    dtype: Any,
) -> _Crops:
    """All that depends on the position."""
    crops = _Crops(where)
    for v in steps:
        _add_planes(crops, where, v, planes[v])
        # Lines are 0 off the map themselves.
        if where.overhangs(v) and planes[v].apply is not jnp.multiply:
            crops.add((v, "on the map"), v, _ones(where, v, dtype))
    if net.input in where.windows:
        for i, leaf in enumerate(jax.tree.leaves(region)):
            edge = _of_the_example(where.windows[net.input]) if leaf is _eps(region) else None
            crops.add((net.input, i), net.input, leaf, edge)
        if where.overhangs(net.input):
            crops.add((net.input, "on the map"), net.input, _ones(where, net.input, dtype))
    crops.close()
    return crops


def _add_planes(crops: _Crops, where: Geometry, v: Var, plane: Planes) -> None:
    """What of v's planes depends on the position."""
    for key in ("below", "above"):
        if getattr(plane, key) is not None:
            crops.add((v, key), v, getattr(plane, key))
    if plane.elementwise:
        same = plane.operands[0].shape == v.shape
        window = where.windows[v] if same else where.edges[v, 0]
        crops.add((v, "lower"), plane.operands[0], plane.lower, window)
        if not plane.affine:
            crops.add((v, "upper"), plane.operands[0], plane.upper, window)


def _ones(where: Geometry, v: Var, dtype: Any) -> Array:
    """Ones on v, as thin as can be."""
    window = where.windows[v]
    shape = [1 if s.axis is None else m for s, m in zip(window, v.shape, strict=True)]
    return jnp.ones(shape, dtype)


def _spread_out(region: InputSet, outward: bool) -> InputSet:
    """The region with arrays of the input's shape, so that off the map it is the point 0."""
    if isinstance(region, Box | LinfBall):
        return box_of(region, outward)
    valid = region.valid
    if valid is not None:
        valid = Box(*[jnp.broadcast_to(end, region.x.shape) for end in (valid.lower, valid.upper)])
    eps = jnp.asarray(region.eps)
    if eps.ndim:
        eps = per_example(eps, region.x)
    return dataclasses.replace(region, eps=eps, valid=valid)


def _eps(region: InputSet) -> Any:
    """The radius of a ball; nothing for a box."""
    return None if isinstance(region, Box) else region.eps


def _of_the_example(window: Window) -> Window:
    """A window for one number per example, along the first axis."""
    return (window[0], *(Span(0, 1) for _ in window[1:]))


def _one_example(region: InputSet) -> InputSet:
    """A cropped region as one example's."""
    if isinstance(region, Box):
        return region
    return dataclasses.replace(region, eps=jnp.reshape(region.eps, -1))


# --- One step back, on windows --------------------------------------------------------------------


def _offsets(below: Array | None, above: Array | None, rows: Array, single: bool) -> Array:
    if below is None and above is None:
        return jnp.zeros((), rows.dtype)

    def total(rows: Array) -> Array:
        return jnp.sum(on_offsets(rows, below, above), tuple(range(1, rows.ndim)))

    low = total(rows)
    if not single:
        return low
    return jnp.concatenate([low, -low if below is above else total(-rows)])


def _transposed(
    net: Net, where: Geometry, v: Var, plane: Planes, here: Mapping[Any, Array], rows: Array
) -> Sequence[Array]:
    """Rows on v's window as rows on each operand's."""
    eqn = net.makers[v]
    shapes = [sizes(where.edges[v, i]) for i in range(len(plane.operands))]
    if not plane.operands:
        return []
    if plane.elementwise:
        if eqn.name == "reduce_max":
            rows = jnp.expand_dims(rows, [1 + axis for axis in eqn.params["axes"]])
        lower = here[v, "lower"]
        return [rows * facing(rows, lower, lower if plane.affine else here[v, "upper"])]
    if eqn.name in RESHAPES:
        return [rows.reshape(len(rows), *shapes[0])]
    apply = _on_window(eqn, plane, where.windows[v], where.edges[v, 0])
    if apply is None:
        return [rows]
    if convolution.has_fast_transpose(eqn):
        before = [low for low, _ in _padding(eqn, where.windows[v])]
        options = (shapes[0], before, net.reverse_only)
        return [convolution.transposed(eqn, plane.lower, rows, *options)]
    structs = [jax.ShapeDtypeStruct(shape, rows.dtype) for shape in shapes]
    return jax.vmap(jax.linear_transpose(apply, *structs))(rows)


def _on_window(
    eqn: Equation, plane: Planes, window: Window, edge: Window
) -> Callable[..., Array] | None:
    """The equation's linear part between windows; None for one that only shifts them."""
    moves = [s.axis is not None for s in window]
    if eqn.name == "pad" and any(moves):
        return None
    if eqn.name == "conv_general_dilated":
        options = {**exact_products(True), "padding": _padding(eqn, window)}
        return lambda x: eqn.bind(x, plane.lower, **options)[0]
    if eqn.name == "reduce_window_sum":
        pairs = zip(moves, eqn.params["padding"], strict=True)
        padding = tuple((0, 0) if moving else pair for moving, pair in pairs)
        return lambda x: eqn.bind(x, padding=padding)[0]
    if eqn.name == "slice":
        p = eqn.params
        spans = list(zip(edge, p["start_indices"], p["limit_indices"], strict=True))
        starts = [low if s.axis is None else 0 for s, low, _ in spans]
        limits = [high if s.axis is None else s.size for s, _, high in spans]
        return lambda x: lax.slice(x, starts, limits, p["strides"])
    return functools.partial(plane.apply, plane.lower)


def _padding(eqn: Equation, window: Window) -> Sequence[tuple[int, int]]:
    """A convolution's own padding on a whole map, none on a window."""
    spatial = eqn.params["dimension_numbers"].out_spec[2:]
    still = all(window[axis].axis is None for axis in spatial)
    return eqn.params["padding"] if still else ((0, 0),) * len(spatial)


def _added(rows_of: Any, mirrored: Any, x: Var, part: Array, single: bool) -> tuple[Array, bool]:
    if x not in rows_of:
        return part, single
    before = rows_of[x]
    if mirrored[x] != single:
        both = [
            jnp.concatenate([r, -r]) if s else r for r, s in ((before, mirrored[x]), (part, single))
        ]
        return both[0] + both[1], False
    return before + part, single


def _embedded(
    rows: Array, edge: Window, window: Window, shape: Sequence[int], position: Array
) -> Array:
    """Rows on an edge's window as rows on the variable's, which contains it."""
    if edge == window:
        return rows
    pads, starts, limits = [(0, 0)], [jnp.zeros((), position.dtype)], [len(rows)]
    for a, b, m in zip(edge, window, shape, strict=True):
        zero = jnp.zeros((), position.dtype)
        if a.axis == b.axis:  # both move, or neither
            low = a.start - b.start
            pads.append((low, b.size - a.size - low))
            starts.append(zero)
            limits.append(b.size)
        else:  # into the whole map: pad by a map on both sides, then cut at minus the offset
            pads.append((m, m))
            starts.append(m - (position[a.axis] * a.stride + a.start))
            limits.append(m)
    padded = jnp.pad(rows, pads)
    return lax.dynamic_slice(padded, starts, limits)
