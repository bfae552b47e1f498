"""Backward linear bounds: rows of coefficients pulled back through a graph to its input.

For rows C on a variable v, the pass keeps C v >= sum_w A_w w + beta for all inputs of the region,
where w runs over a frontier that moves from v to the input. Pulling A through the planes of an
equation uses the lower plane where A > 0 and the upper one where A < 0 (Zhang et al., "Efficient
neural network robustness certification with general activation functions", NeurIPS 2018).

Rows and their negatives give lower and upper bounds. As long as nothing but affine equations was
met, the rows are the same for both signs and for all examples of the batch, so they are kept once:
`mirrored` (both signs) and `thin` (a batch axis of size 1).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds.convolution import has_fast_transpose, transposed
from jaxcert.bounds.planes import Planes
from jaxcert.graph import Equation, Graph, Var
from jaxcert.rows import Rows
from jaxcert.sets import Array


@dataclasses.dataclass(frozen=True)
class Net:
    """A graph with the place of its examples.

    Attributes:
      graph: the equations.
      rows: where each bounded value has its examples.
      batch: how many there are.
      makers: the equation of each variable, in order of evaluation.
      reverse_only: see `convolution.transposed`.
    """

    graph: Graph
    rows: Mapping[Var, Rows]
    batch: int
    makers: Mapping[Var, Equation]
    reverse_only: bool = False

    @property
    def input(self) -> Var:
        """The bounded input."""
        return self.graph.inputs[0]

    def outer_and_inner(self, v: Var) -> tuple[int, int]:
        """v's shape in row-major order as (outer, batch, inner)."""
        size = math.prod(v.shape)
        if self.batch == 1:
            return size, 1
        place = self.rows[v]
        outer = math.prod(v.shape[: place.axis]) * place.outer
        return outer, size // max(1, outer * self.batch)

    def thin_shape(self, v: Var) -> tuple[int, ...] | None:
        """v's shape for one example, if examples lie along an axis of their own."""
        if self.batch == 1:
            return v.shape
        place = self.rows[v]
        if place.outer != 1 or v.shape[place.axis] != self.batch:
            return None
        return (*v.shape[: place.axis], 1, *v.shape[place.axis + 1 :])

    def flat(self, values: Array, v: Var) -> Array:
        """Entries of v as rows of their own, (b, n)."""
        outer, inner = self.outer_and_inner(v)
        parts = values.reshape(outer, self.batch, inner)
        return jnp.moveaxis(parts, 1, 0).reshape(self.batch, -1)

    def shaped(self, values: Array, v: Var) -> Array:
        """The opposite of `flat`."""
        outer, inner = self.outer_and_inner(v)
        return jnp.moveaxis(values.reshape(self.batch, outer, inner), 0, 1).reshape(v.shape)

    def per_example(self, products: Array, v: Var) -> Array:
        """The sum (r, b) of (r, *v) over everything but the examples."""
        if self.batch == 1:
            return jnp.sum(products, tuple(range(1, products.ndim)))[:, None]
        if self.thin_shape(v) is not None:  # faster than after a reshape
            axis = self.rows[v].axis + 1
            return jnp.sum(products, tuple(i for i in range(1, products.ndim) if i != axis))
        outer, inner = self.outer_and_inner(v)
        return jnp.sum(products.reshape(-1, outer, self.batch, inner), (1, 3))

    def spread(self, numbers: Array, v: Var) -> Array:
        """One number per example (b,) at each entry of v."""
        outer, inner = self.outer_and_inner(v)
        shape = (outer, self.batch, inner)
        return jnp.broadcast_to(numbers[:, None], shape).reshape(v.shape)


@dataclasses.dataclass(frozen=True)
class Form:
    """Coefficients on a variable, one row after the other.

    Attributes:
      rows: (r, *shape); the shape has a batch axis of size 1 if thin.
      mirrored: whether the negative of each row is meant as well; else `rows` holds both halves.
      thin: whether the rows are the same for all examples.
    """

    rows: Array
    mirrored: bool
    thin: bool

    @property
    def count(self) -> int:
        """How many rows are meant."""
        return len(self.rows) * (2 if self.mirrored else 1)


def unit_rows(net: Net, v: Var, index: Array, dtype: Any) -> Form:
    """The rows that pick the entries `index` of v: (n,) for all examples or (n, b) for each."""
    outer, inner = net.outer_and_inner(v)
    rows = (index[..., None] == jnp.arange(outer * inner)).astype(dtype)
    shape = net.thin_shape(v)
    if index.ndim == 1 and shape is not None:
        return Form(rows.reshape(-1, *shape), mirrored=True, thin=True)
    rows = rows.reshape(len(index), -1, outer, inner)
    rows = jnp.broadcast_to(rows, (len(index), net.batch, outer, inner))
    return Form(jnp.moveaxis(rows, 1, 2).reshape(-1, *v.shape), mirrored=True, thin=False)


def memory() -> int:
    """Bytes of coefficients to work on at a time: a CPU's cache, or a part of another memory."""
    return 2**20 if jax.default_backend() == "cpu" else 2**28


def entries(net: Net, bounds: Array, v: Var) -> Array:
    """Bounds (n, b) of all entries of v in v's own shape."""
    return net.shaped(bounds.T, v)


Stop: TypeAlias = Callable[[Array], tuple[Array, Array]]
"""(rows (r, *v)) -> other rows of the same shape, and what they add to the offsets, (r, b)."""


def pull_back(
    net: Net,
    planes: Mapping[Var, Planes],
    start: Var,
    form: Form,
    stops: Mapping[Var, Stop] | None = None,
) -> tuple[Array, Array]:
    """Rows on `start` as rows (r, *input) on the input that bound them from below, and offsets
    (r, b); of mirrored rows the negatives follow behind.

    Where `stops` has a function for a variable, the rows go on as it says.
    """
    return pull_back_together(net, planes, {start: form}, stops)


def pull_back_together(
    net: Net,
    planes: Mapping[Var, Planes],
    starts: Mapping[Var, Form],
    stops: Mapping[Var, Stop] | None = None,
) -> tuple[Array, Array]:
    """As `pull_back`, the rows on several variables in one pass; those on the last variable come
    first, in the order of `ancestors`."""
    dtype, stops = next(iter(starts.values())).rows.dtype, stops or {}
    forms: dict[Var, Form] = {}
    offset, total = jnp.zeros((0, net.batch), dtype), 0

    def arrived(v: Var) -> Form:
        nonlocal offset, total
        form = forms.pop(v, None)
        if v in starts:
            form = _begun(net, v, form, starts[v], total)
            offset = jnp.concatenate([offset, jnp.zeros((form.count - total, net.batch), dtype)])
            total = form.count
        if form is None:  # constant on the region
            form = Form(jnp.zeros((0, *v.shape), dtype), mirrored=False, thin=False)
        return _padded(net, v, form, total)

    for v in ancestors(net, planes, *starts):
        form, plane = arrived(v), planes[v]
        if not plane.affine or v in stops:
            form = _written_out(net, v, form)
        if v in stops:
            rows, more = stops[v](form.rows)
            form, offset = dataclasses.replace(form, rows=rows), offset + more
        offset = offset + _offsets(net, v, plane, form)
        if form.thin and not _is_thin(net, v, plane):
            form = _thick(net, v, form)
        for x, rows in zip(plane.operands, _transposed(net, v, plane, form), strict=True):
            part = dataclasses.replace(form, rows=rows)
            forms[x] = _added(net, x, forms[x], part) if x in forms else part
    rows = _written_out(net, net.input, arrived(net.input)).rows
    if net.input in stops:
        rows, more = stops[net.input](rows)
        offset = offset + more
    return rows, offset


def ancestors(net: Net, planes: Mapping[Var, Planes], *starts: Var) -> list[Var]:
    """What `starts` are made of, themselves included and the input not, last first."""
    wanted, found = {*starts}, []
    for v in reversed(list(net.makers)):
        if v in wanted:
            found.append(v)
            wanted.update(planes[v].operands)
    return found


def _begun(net: Net, v: Var, form: Form | None, new: Form, total: int) -> Form:
    """The form of v with new rows behind the `total` rows that there are so far."""
    if total == 0:
        return new
    new = _written_out(net, v, new)
    none = Form(jnp.zeros((0, *v.shape), new.rows.dtype), mirrored=False, thin=False)
    old = _written_out(net, v, _padded(net, v, form or none, total))
    return dataclasses.replace(new, rows=jnp.concatenate([old.rows, new.rows]))


def _padded(net: Net, v: Var, form: Form, count: int) -> Form:
    """The form with rows of zeros up to this number."""
    if form.count == count:
        return form
    form = _written_out(net, v, form)
    more = jnp.zeros((count - form.count, *v.shape), form.rows.dtype)
    return dataclasses.replace(form, rows=jnp.concatenate([form.rows, more]))


def _offsets(net: Net, v: Var, plane: Planes, form: Form) -> Array:
    """What the planes' offsets add to the rows and, if mirrored, to their negatives."""
    if plane.below is None and plane.above is None:
        return jnp.zeros((), form.rows.dtype)

    def total(rows: Array) -> Array:
        return net.per_example(on_offsets(rows, plane.below, plane.above), v)

    if not form.mirrored:
        return total(form.rows)
    low = total(form.rows)
    return jnp.concatenate([low, -low if plane.below is plane.above else total(-form.rows)])


def facing(rows: Array, lower: Any, upper: Any) -> Any:
    """What each coefficient meets: the upper side of a plane where it is negative, or the lower."""
    return lower if lower is upper else jnp.where(rows < 0, upper, lower)


def on_offsets(rows: Array, below: Array | None, above: Array | None) -> Array:
    """rows times the offsets they meet. Where a row is 0 an infinite one does not matter; an
    unknown one (NaN) always does.
    """
    low, high = (jnp.zeros(()) if t is None else t for t in (below, above))
    unless_known = jnp.where(jnp.isnan(low) | jnp.isnan(high), jnp.nan, 0.0)
    offset = low if below is above else facing(rows, low, high)
    return jnp.where(rows == 0, unless_known, rows * offset)


RESHAPES = frozenset(["reshape", "squeeze"])  # their transposes are reshapes


def _transposed(net: Net, v: Var, plane: Planes, form: Form) -> tuple[Array, ...]:
    """The rows on each operand."""
    if not plane.operands:
        return ()
    shapes = [net.thin_shape(x) if form.thin else x.shape for x in plane.operands]
    if net.makers[v].name in RESHAPES:
        return (form.rows.reshape(-1, *shapes[0]),)  # type: ignore[misc]
    if has_fast_transpose(net.makers[v]):
        eqn = net.makers[v]
        before = [low for low, _ in eqn.params["padding"]]
        options: Any = (shapes[0], before, net.reverse_only)
        return (transposed(eqn, plane.lower, form.rows, *options),)
    structs = [jax.ShapeDtypeStruct(shape, form.rows.dtype) for shape in shapes]  # type: ignore

    def pull(weight: Any, rows: Array) -> tuple[Array, ...]:
        transpose = jax.linear_transpose(functools.partial(plane.apply, weight), *structs)
        return jax.vmap(transpose)(rows)

    if plane.affine:
        return pull(plane.lower, form.rows)
    if plane.apply is jnp.multiply:  # weights may differ from row to row
        return (form.rows * facing(form.rows, plane.lower, plane.upper),)
    lower = pull(plane.lower, jnp.maximum(form.rows, 0))
    upper = pull(plane.upper, jnp.minimum(form.rows, 0))
    return tuple(a + b for a, b in zip(lower, upper, strict=True))


_SHAPE_FREE = frozenset(
    """
    dot_general conv_general_dilated neg transpose rev reduce_sum reduce_window_sum cumsum
    convert_element_type reduce_precision stop_gradient copy reshape squeeze
    """.split()
)


def _is_thin(net: Net, v: Var, plane: Planes) -> bool:
    """Whether the planes are the same for all examples and their rule for any batch size."""
    if net.batch == 1:
        return True
    eqn = net.makers[v]
    if any(net.thin_shape(x) is None for x in (v, *plane.operands)):
        return False
    if eqn.name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
        return False  # weights per example
    elementwise = eqn.name in ("add", "sub", "mul", "div")
    one_for_all = all(
        jnp.ndim(w) == 0 or jnp.shape(w)[net.rows[v].axis] == 1
        for w in jax.tree.leaves(plane.lower)
    )
    return (eqn.name in _SHAPE_FREE or (elementwise and one_for_all)) and plane.affine


def _written_out(net: Net, v: Var, form: Form) -> Form:
    """The rows of both signs for all examples."""
    form = _thick(net, v, form)
    if not form.mirrored:
        return form
    return Form(jnp.concatenate([form.rows, -form.rows]), mirrored=False, thin=False)


def _thick(net: Net, v: Var, form: Form) -> Form:
    if not form.thin:
        return form
    return dataclasses.replace(
        form, rows=jnp.broadcast_to(form.rows, (len(form.rows), *v.shape)), thin=False
    )


def _added(net: Net, v: Var, a: Form, b: Form) -> Form:
    if a.mirrored != b.mirrored:
        a, b = _written_out(net, v, a), _written_out(net, v, b)
    if a.thin != b.thin:
        a, b = _thick(net, v, a), _thick(net, v, b)
    if a.count != b.count:
        most = max(a.count, b.count)
        a, b = _padded(net, v, a, most), _padded(net, v, b, most)
    return dataclasses.replace(a, rows=a.rows + b.rows)
