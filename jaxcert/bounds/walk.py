"""One forward sweep over a graph: a box and planes for every variable.

Boxes come from interval rules, and where a nonlinear function reads a variable, from whatever the
caller bounds it with. Planes (`planes.py`) are fitted to the boxes as they stand then.
"""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import Form, Net
from jaxcert.bounds.concretise import around_centre, box_of
from jaxcert.bounds.expand import CLAMPED, Expanded, expand
from jaxcert.bounds.interpreter import Value, apply_rule, lower, operand, upper
from jaxcert.bounds.planes import CONSTANT, Planes, is_affine, planes_of
from jaxcert.bounds.relaxations import LINES
from jaxcert.bounds.residual import Operand, Use, products, with_rounding
from jaxcert.bounds.rules import unless
from jaxcert.graph import Equation, Graph, Var
from jaxcert.rows import Rows, check
from jaxcert.sets import Array, Box, InputSet, LinfBall

BoundHidden: TypeAlias = Callable[["Walk", Var], Box]
"""(walk so far, variable) -> a box of the variable."""


class Walk:
    """One forward sweep over a graph: a box and planes for every variable.

    Attributes:
      net: the expanded graph.
      boxes: what is known of each variable.
      planes: around each bounded variable, functions of others.
      lines: those of the planes that are lines, before their rounding is counted.
      dtype: of boxes and offsets.
      rows_dtype: of coefficients.
      centres: from which the planes' distances are, where these types differ (`residual.py`).
      around: the region, around its centre if there are centres.
    """

    def __init__(
        self,
        graph: Graph,
        rows: Mapping[Var, Rows],
        region: InputSet,
        outward: bool,
        coefficients: Any = jnp.float64,
    ):
        self.expanded: Expanded = expand(graph)
        graph = self.expanded.graph
        batch = graph.inputs[0].shape[0]
        if batch > 1:
            rows = check(graph, batch)
        makers = {out: eqn for eqn in graph.equations for out in eqn.outputs if out.bounded}
        self.net = Net(graph, rows, batch, makers)
        self.region, self.outward = region, outward
        self._coefficients = coefficients
        if outward and coefficients == jnp.float32:
            _check_products(graph)
        self._readers = _count_readers(graph)
        self._start()

    def _start(self) -> None:
        x, box = self.net.input, box_of(self.region, self.outward)
        self.dtype = box.lower.dtype
        self.rows_dtype = jnp.dtype(self._coefficients if self.outward else self.dtype)
        self.boxes: dict[Var, Value] = {x: box}
        self.planes: dict[Var, Planes] = {}
        self.lines: dict[Var, Planes] = {}
        self.centres: dict[Var, Array] = {}
        self.around = self.region
        if self.rows_dtype != self.dtype:
            self.around, self.centres[x] = around_centre(self.region)
        self.refined: list[Var] = []  # what was bounded by the caller, in order
        self.dust: Any = jnp.full(self.net.batch, 2.0**-960 if self.outward else 0.0, self.dtype)
        self._spread = {x: 0 if isinstance(self.region, Box | LinfBall) else 2}

    def again(self) -> "Walk":
        """The same walk, not yet run."""
        fresh = copy.copy(self)
        fresh._start()
        return fresh

    @property
    def output(self) -> Var:
        """The graph's output, which depends on the input."""
        out = self.net.graph.outputs[0]
        if not isinstance(out, Var) or not out.bounded:
            raise ValueError("the model's output does not depend on its input: evaluate it instead")
        return out

    def run(self, bound_hidden: BoundHidden | None, *, every: bool = False) -> None:
        """Fill in boxes and planes in order of evaluation.

        Args:
          bound_hidden: what bounds operands of nonlinear functions.
          every: whether it is asked for all of them, also where intervals are as good as it gets.
        """
        for eqn in self.net.graph.equations:
            if eqn.bounded and bound_hidden is not None:
                for v in self._operands(eqn) if every else self._worth_bounding(eqn):
                    self.boxes[v] = meet(self.boxes[v], bound_hidden(self, v))
                    self._spread[v] = 1
                    self.refined.append(v)
            values = [operand(self.boxes, a, self.outward) for a in eqn.inputs]
            results = apply_rule(eqn, values, self.outward)
            self.boxes.update(zip(eqn.outputs, results, strict=True))
            for out in eqn.outputs:
                if out in self.expanded.originals:
                    self._meet_original(out)
            if eqn.bounded:
                self._add_planes(eqn, values)

    def _operands(self, eqn: Equation) -> list[Var]:
        """Operands whose box matters and which were not bounded yet."""
        return [
            v
            for v in dict.fromkeys(_bounded(eqn))
            if (v in self.expanded.fine if is_affine(eqn) else v not in self.expanded.coarse)
            and jnp.issubdtype(v.dtype, jnp.floating)
            and v not in self.refined
        ]

    def _worth_bounding(self, eqn: Equation) -> list[Var]:
        """Operands whose box should come from a linear bound."""
        return [v for v in self._operands(eqn) if self.loose(v)]

    def loose(self, v: Var) -> bool:
        """Whether a linear bound may be tighter than the box."""
        return self._spread[v] > 1

    def _meet_original(self, out: Var) -> None:
        eqn = self.expanded.originals[out]
        values = [operand(self.boxes, a, self.outward) for a in eqn.inputs]
        (known,) = apply_rule(eqn, values, self.outward)
        unknown = jnp.isnan(known.lower) | jnp.isnan(known.upper)
        if eqn.name in CLAMPED:
            unknown |= self._below_least(eqn.inputs[0], out)
        self.boxes[out] = unless(unknown, meet(self.boxes[out], known))

    def _below_least(self, x: Any, out: Var) -> Array:
        """Where an example's x may be beyond the least number of its type or its negative, which
        stand for infinity in an expansion: a proof's float64 reaches further than a float32 model.
        """
        box, least = self.boxes[x], float(jnp.finfo(x.dtype).min)
        below = (box.lower < least) & (box.upper > -jnp.inf)
        below |= (box.upper > -least) & (box.lower < jnp.inf)
        return self.net.spread(self.net.per_example(below[None] * 1.0, x)[0] > 0, out)

    def _add_planes(self, eqn: Equation, values: Sequence[Value]) -> None:
        level = _spread_after(eqn, [self._spread[a] for a in _bounded(eqn)])
        self._spread.update(dict.fromkeys(eqn.outputs, level))
        if not all(jnp.issubdtype(out.dtype, jnp.floating) for out in eqn.outputs):
            return
        found = planes_of(eqn, [cast(v, self.dtype) for v in values], self.outward)
        for out, plane in zip(eqn.outputs, found, strict=True):
            if eqn.name in LINES:
                plane = or_constant(plane, self.boxes[out])
            if eqn.name in LINES or out in self.expanded.originals:
                plane = _unknown_with(plane, self.boxes[out])
            if eqn.name in LINES:
                self.lines[out] = plane
            self.planes[out] = self.counted(out, plane) if self.outward else plane
        if self.outward and eqn.name == "add":
            self._take_over_offsets(eqn.outputs[0])

    def counted(self, out: Var, plane: Planes) -> Planes:
        """The plane with its rounding, in a proof.

        Numbers that are flushed to zero do not scale with the rows: for each example, `dust` adds
        up what they can amount to, the smallest normal number (2^-1022, or 2^-126 for float32 rows)
        times the sizes and far fewer than 2^42 times over; and 2^-960 for offsets.
        """
        eqn = self.net.makers[out]
        readers = max((self._readers[x] for x in plane.operands), default=1)
        centres = [self.centres.get(x) for x in plane.operands]
        sizes = [
            size_of(self.boxes[x], centre)
            for x, centre in zip(plane.operands, centres, strict=True)
        ]
        if plane.elementwise:  # what is multiplied by 0 may be as large as it likes
            sizes = [jnp.where((plane.lower != 0) | (plane.upper != 0), sizes[0], 0)]
        if products(eqn) or readers > 1:
            double = self.rows_dtype == jnp.float64
            for x, size in zip(plane.operands, sizes, strict=True):
                size = _unless_mask(size) if double else size
                part = self.net.per_example(size[None], x)[0]
                self.dust = self.dust + part * (2.0**-980 if double else 2.0**-84)
        terms = math.prod(eqn.outputs[0].shape) + len(self.net.graph.equations)
        operands = [Operand(s, c) for s, c in zip(sizes, centres, strict=True)]
        use = Use(readers, terms, self.rows_dtype)
        plane, centre = with_rounding(plane, eqn, operands, use, self.centres.get(out))
        if centre is not None:
            self.centres[out] = centre
        return plane

    def _take_over_offsets(self, out: Var) -> None:
        """Move the offsets of what a constant is added to, if nothing else reads it, to the sum.

        Rows on both are the same, and one sum over them is cheaper than two.
        """
        plane = self.planes[out]
        x = plane.operands[0]
        before = self.planes.get(x)
        if len(plane.operands) > 1 or x.shape != out.shape or self._readers[x] > 1:
            return
        if x in self.refined:  # rows may start there
            return
        if before is None or x in self.lines or before.below is None or before.above is None:
            return
        low, high = (0.0 if t is None else t for t in (plane.below, plane.above))
        both = Box(low + before.below, high + before.above)
        both = rounding.widen(both, rounding.ARITHMETIC)
        self.planes[out] = dataclasses.replace(plane, below=both.lower, above=both.upper)
        self.planes[x] = dataclasses.replace(before, below=None, above=None)

    def from_centre(self, v: Var, form: Form, values: Array) -> Array:
        """Lower bounds (r, b) of rows on v, from those of the rows on distances from v's centre; of
        mirrored rows and then of their negatives, (2 r, b)."""
        if v not in self.centres:
            return values
        values = rounding.widen(Box(values, values), rounding.ARITHMETIC).lower
        terms = form.rows * self.centres[v]
        n = math.prod(v.shape)
        error = rounding.gamma(n + 4) * self.net.per_example(jnp.abs(terms), v)
        error = rounding.inflate(error, n)
        total = self.net.per_example(terms, v)
        if not form.mirrored:
            return values + (total - error)
        return values + jnp.concatenate([total - error, -total - error])


def size_of(box: Box, centre: Array | None) -> Array:
    """The largest |x|, or the largest distance from a centre."""
    low, high = lower(box), upper(box)
    if centre is not None:
        distance = jnp.maximum(high - centre, centre - low)
        return distance * (1 + 8 * rounding.UNIT) + 4 * rounding.TINY
    return jnp.maximum(jnp.abs(low), jnp.abs(high))


def _check_products(graph: Graph) -> None:
    """Refuse float32 convolutions whose algorithm is not known to be a sum of products."""
    backend = jax.default_backend()
    if backend != "cpu" and any(e.name == "conv_general_dilated" for e in graph.equations):
        raise ValueError(
            f"float32 convolutions on {backend} may take algorithms (Winograd's, Fourier's) whose "
            "rounding this proof does not count: use coefficients=jnp.float64"
        )


def _unknown_with(plane: Planes, box: Box) -> Planes:
    """The plane, unknown (NaN) where its variable is."""
    unknown = jnp.where(jnp.isnan(box.lower) | jnp.isnan(box.upper), jnp.nan, 0.0)
    offsets = [0.0 if t is None else t for t in (plane.below, plane.above)]
    return dataclasses.replace(plane, below=offsets[0] + unknown, above=offsets[1] + unknown)


def _unless_mask(size: Array) -> Array:
    """Sizes, but for numbers that stand for minus infinity in a mask."""
    return jnp.where(size >= 2.0**900, 0, size)


def or_constant(plane: Planes, box: Box) -> Planes:
    """The planes, or the ends of the box where a plane is not finite."""
    assert plane.below is not None
    assert plane.above is not None
    sides = []
    for weight, offset, end in (
        (plane.lower, plane.below, box.lower),
        (plane.upper, plane.above, box.upper),
    ):
        finite = jnp.isfinite(weight) & jnp.isfinite(offset)
        sides += [jnp.where(finite, weight, 0), jnp.where(finite, offset, end)]
    return dataclasses.replace(
        plane, lower=sides[0], below=sides[1], upper=sides[2], above=sides[3]
    )


def _bounded(eqn: Equation) -> list[Var]:
    return [a for a in eqn.inputs if isinstance(a, Var) and a.bounded]


def cast(value: Any, dtype: Any) -> Any:
    """A value in another float type; other types stay."""
    if jnp.issubdtype(lower(value).dtype, jnp.floating):
        return jax.tree.map(lambda a: a.astype(dtype), value)
    return value


def _count_readers(graph: Graph) -> Counter[Var]:
    """How many equations read each variable; who asks for the graph's output reads it, too."""
    read = [a for eqn in graph.equations for a in eqn.inputs]
    return Counter(a for a in (*read, *graph.outputs) if isinstance(a, Var))


_MIXING = frozenset("dot_general conv_general_dilated reduce_sum reduce_window_sum cumsum".split())
_COPYING = frozenset("broadcast_in_dim gather tile dynamic_slice concatenate stack".split())


def _spread_after(eqn: Equation, levels: Sequence[int]) -> int:
    """How much tighter than by intervals an equation's result could be bounded by planes.

    0: not at all, and on a box each entry depends on an input entry of its own. 1: not at all, but
    entries may share input entries, so that sums of them could be. 2: tighter.

    A function of one operand gains nothing: its interval is its range over the operand's box, and
    its lines, which lie outside of it, meet the same linear bounds of the operand.
    """
    if eqn.name in LINES or eqn.name in CONSTANT:
        return 1
    if len(levels) != 1 or not is_affine(eqn):
        return 2
    if eqn.name in _MIXING:
        return 1 if levels[0] == 0 else 2
    return max(levels[0], 1) if eqn.name in _COPYING else levels[0]


def meet(a: Box, b: Box) -> Box:
    """What two boxes know together; one that knows nothing (NaN) does not count."""
    low = jnp.where(jnp.isnan(a.lower), b.lower, jnp.fmax(a.lower, b.lower))
    high = jnp.where(jnp.isnan(a.upper), b.upper, jnp.fmin(a.upper, b.upper))
    return Box(jnp.minimum(low, high), jnp.maximum(low, high))
