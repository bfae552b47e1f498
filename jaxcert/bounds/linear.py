"""Linear bound propagation as function transforms: crown, crown_ibp and the bounds themselves.

All pull the rows of the spec back to the input (`backward.py`) through two affine functions around
each equation (`planes.py`). What those need is a box for each nonlinear function's operand:
`crown_ibp` takes interval bounds (Zhang et al., "Towards stable and efficient training of
verifiably robust neural networks", ICLR 2020), `crown` pulls unit rows back from each of them
(Zhang et al., "Efficient neural network robustness certification with general activation
functions", NeurIPS 2018).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import Form, entries, pull_back, unit_rows
from jaxcert.bounds.hidden import concretised, refined, refined_where_unsure, with_dust
from jaxcert.bounds.interval import ibp, interval_bounds
from jaxcert.bounds.last_layer import spec_matrix
from jaxcert.bounds.transform import Bound, Method, transform
from jaxcert.bounds.walk import BoundHidden, Walk, meet, size_of
from jaxcert.graph import Var
from jaxcert.model import Model
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box, InputSet
from jaxcert.specs import Spec

Hidden: TypeAlias = Method | Sequence[Box]
"""`crown` or `crown_ibp` for hidden values bounded as they do it, or boxes from `hidden_bounds`."""


def crown(
    f: Model,
    *,
    outward: bool = False,
    unsure: int | None = None,
    chunk: int | None = None,
    coefficients: Any = jnp.float64,
) -> Bound:
    """Linear bounds of f: for every x in the region, lower <= C f(x) + d <= upper.

    Every hidden value that a nonlinear function reads is bounded by linear bounds itself, which is
    quadratic in the depth and as a rule much tighter than `crown_ibp`; never looser than `ibp`.

    Args:
      f: the model, (b, *input) -> (b, *out) with independent rows.
      outward: as for `ibp`: False is for training and search and NOT a proof; True computes in
        float64, counts every rounding error (`residual.py`) and rounds the ends outward.
      unsure: if given, at most so many entries of each hidden value are bounded that way for each
        example, those that reach furthest to both sides of zero; the others keep interval bounds,
        which costs a relu network nothing where their sign is decided.
      chunk: how many rows of coefficients are held at a time; by default as many as fit 1 MiB on a
        CPU and 256 MiB elsewhere. They take up 2 chunk b m numbers for the widest hidden value m.
      coefficients: the float type of those rows in a proof, jnp.float64 or jnp.float32. Rounding is
        counted for either; float32 takes a third to three quarters of the time on a CPU, and makes
        bounds wider, as a rule by less than 1 %. Without `outward` rows have the region's own type.

    Returns:
      A function `(region, spec=None) -> Box` of shape (b, *out), or (b, s) with a spec. The region
      may be any set: bounds over L2 and L1 balls use the dual norm, cut balls weak duality. Pure:
      works under jit, vmap and grad. NaN means that nothing is known.

    Raises:
      UnsupportedEquation: an equation has no linear rule; `ibp` may have an interval rule.
      MixedRows: an example's output depends on other examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> f = lambda x: jnp.maximum(x, 0) - x
      >>> box = crown(f)(LinfBall(jnp.ones((1, 1)), 0.5))
      >>> print(abs(box.lower), box.upper)
      [[0.]] [[0.]]
    """
    bound = functools.partial(_bound, hidden=bounder(crown, unsure, chunk), chunk=chunk)
    return walking(f, outward, bound, coefficients)


def crown_ibp(
    f: Model,
    *,
    outward: bool = False,
    hidden: Sequence[Box] | None = None,
    coefficients: Any = jnp.float64,
) -> Bound:
    """Linear bounds of f with interval bounds for the hidden layers: cheap enough for training.

    Arguments, results and errors as for `crown`; never looser than `ibp`.

    Args:
      f, outward, coefficients: as for `crown`.
      hidden: boxes of the hidden values to use instead, from `hidden_bounds` on this region or on a
        larger one; a proof is as good as they are.
    """
    bound = functools.partial(_bound, hidden=bounder(ibp if hidden is None else hidden))
    return walking(f, outward, bound, coefficients)


def hidden_bounds(
    f: Model,
    *,
    outward: bool = False,
    unsure: int | None = None,
    chunk: int | None = None,
    coefficients: Any = jnp.float64,
) -> Callable[[InputSet], tuple[Box, ...]]:
    """The boxes that `crown` puts around hidden values, to be used again by `crown_ibp`,
    `alpha_crown` and `linear_bounds` with `hidden=`, for this region or parts of it.

    Arguments and errors as for `crown`. The boxes come in order of evaluation, one for each hidden
    value that a nonlinear function reads, in float64 with `outward`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> f = lambda x: jnp.maximum(jnp.maximum(x, 0) - x - 0.5, 0)
      >>> boxes = hidden_bounds(f)(LinfBall(jnp.zeros((1, 1)), 1.0))
      >>> print(len(boxes), boxes[0].lower, boxes[0].upper)
      1 [[-1.5]] [[0.5]]
      >>> print(crown_ibp(f, hidden=boxes)(LinfBall(jnp.zeros((1, 1)), 0.5)).upper)
      [[0.33333334]]
    """

    coefficients = float_type(coefficients)

    def boxes(graph, rows, region, spec, outward):
        walk = Walk(graph, rows, region, outward, coefficients)
        walk.run(bounder(crown, unsure, chunk))
        return tuple(walk.boxes[v] for v in walk.refined)

    return transform(f, outward, boxes)  # type: ignore[return-value]


@pytree
@dataclasses.dataclass(frozen=True)
class LinearBounds:
    """Affine functions of the input around each row of C f(x) + d, for x in the region:

        lower_matrix x + lower_offset  <=  C f(x) + d  <=  upper_matrix x + upper_offset.

    Attributes:
      lower_matrix, upper_matrix: (b, s, *input); the product sums over the input's axes.
      lower_offset, upper_offset: (b, s).
    """

    lower_matrix: Array
    lower_offset: Array
    upper_matrix: Array
    upper_offset: Array


def linear_bounds(
    f: Model, *, hidden: Hidden = crown, outward: bool = False
) -> Callable[..., LinearBounds]:
    """The affine functions that `crown` or `crown_ibp` (`hidden`) minimise over the region.

    Returns:
      A function `(region, spec=None) -> LinearBounds`. Without a spec the rows are the outputs, in
      row-major order. With `outward` the inequalities hold in real arithmetic for the float64
      numbers returned.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> found = linear_bounds(lambda x: jnp.maximum(x, 0))(LinfBall(jnp.ones((1, 1)), 2.0))
      >>> print(found.lower_matrix, found.upper_matrix, found.upper_offset)
      [[[1.]]] [[[0.75]]] [[0.75]]
    """
    bound = bounder(hidden)

    def functions(graph, rows, region, spec, outward):
        walk = Walk(graph, rows, region, outward)
        walk.run(bound)
        goal = Goal(walk, spec)
        matrix, offset = pull_back(walk.net, walk.planes, walk.output, goal.form)
        half = len(offset) // 2
        box = with_dust(walk, Box(offset[:half].T, -offset[half:].T), walk.dust[:, None])
        box = box if spec is None else shifted(walk, spec, box)
        matrix = jnp.moveaxis(matrix, 0, 1)
        return LinearBounds(matrix[:, :half], box.lower, -matrix[:, half:], box.upper)

    return transform(f, outward, functions)  # type: ignore[return-value]


def bounder(
    hidden: Hidden, unsure: int | None = None, chunk: int | None = None
) -> BoundHidden | None:
    """How hidden values are bounded: by rows of their own, by known boxes, or by intervals only."""
    if hidden is ibp or hidden is crown_ibp:
        return None
    if isinstance(hidden, functools.partial):
        options = {"unsure": unsure, "chunk": chunk, **hidden.keywords}
        return bounder(hidden.func, options["unsure"], options["chunk"])
    if hidden is crown and unsure is not None:
        return functools.partial(refined_where_unsure, count=unsure, chunk=chunk)
    if hidden is crown:
        return functools.partial(refined, chunk=chunk)
    boxes: Any = hidden if isinstance(hidden, tuple | list) else [None]
    if not all(isinstance(box, Box) for box in boxes):
        raise ValueError(
            "hidden must be one of the functions crown, crown_ibp and ibp, or boxes from "
            f"hidden_bounds, got {hidden!r}"
        )
    return functools.partial(_known, boxes=tuple(boxes))


def _known(walk: Walk, v: Var, boxes: Sequence[Box]) -> Box:
    """The box of the next hidden value."""
    if walk.outward and any(box.lower.dtype != jnp.float64 for box in boxes):
        raise ValueError("a proof needs proved boxes, from hidden_bounds(f, outward=True)")
    place = len(walk.refined)
    if place >= len(boxes) or boxes[place].lower.shape != v.shape:
        shapes = [box.lower.shape for box in boxes]
        raise ValueError(
            f"hidden value {place} has shape {v.shape}, the given boxes have shapes {shapes}; take "
            "them from hidden_bounds of the same model, on a set of the same kind and batch size"
        )
    return jax.tree.map(lambda end: jnp.asarray(end, walk.dtype), boxes[place])


def _bound(
    walk: Walk, spec: Spec | None, *, hidden: BoundHidden | None, chunk: int | None = None
) -> Box:
    walk.run(hidden)
    if spec is None:
        return meet(walk.boxes[walk.output], refined(walk, walk.output, chunk))
    goal = Goal(walk, spec)
    low, high = concretised(walk, walk.output, goal.form, walk.planes)
    return shifted(walk, spec, Box(low.T, high.T))


def float_type(coefficients: Any) -> Any:
    """The type of coefficients, checked."""
    if coefficients not in (jnp.float64, jnp.float32):
        raise ValueError(
            f"coefficients must be jnp.float64 or jnp.float32, got {coefficients!r}: rounding in "
            "other types is not counted"
        )
    return jnp.dtype(coefficients)


def walking(
    f: Model,
    outward: bool,
    bound: Callable[[Walk, Spec | None], Box],
    coefficients: Any = jnp.float64,
) -> Bound:
    """The transform of a bound that is found on a walk, never looser than interval bounds."""
    coefficients = float_type(coefficients)

    def propagate(graph, rows, region, spec, outward):
        known = interval_bounds(graph, rows, region, spec, outward)
        out = graph.outputs[0]
        if not isinstance(out, Var) or not out.bounded:  # there is nothing to pull back
            return known
        return meet(known, bound(Walk(graph, rows, region, outward, coefficients), spec))

    return transform(f, outward, propagate)


class Goal:
    """What is to be bounded: the rows of a spec on the output, or without one all its entries.

    Attributes:
      form: the rows C, (s, b, k) or thin.
    """

    def __init__(self, walk: Walk, spec: Spec | None):
        self.walk, self.spec = walk, spec
        out = walk.output
        if spec is None:
            count = math.prod(walk.net.outer_and_inner(out))
            self.form = unit_rows(walk.net, out, jnp.arange(count), walk.rows_dtype)
            return
        matrix = spec_matrix(spec, out.shape, walk.dtype).astype(walk.rows_dtype)
        self.form = Form(jnp.moveaxis(matrix, 1, 0), mirrored=True, thin=False)

    def shaped(self, box: Box) -> Box:
        """Bounds (b, s) in the shape that the caller expects."""
        if self.spec is not None:
            return shifted(self.walk, self.spec, box)
        ends = [entries(self.walk.net, end.T, self.walk.output) for end in (box.lower, box.upper)]
        return Box(*ends)


def shifted(walk: Walk, spec: Spec, box: Box) -> Box:
    """Bounds (b, s) on the rows of a spec with its offset added."""
    offset = jnp.broadcast_to(jnp.asarray(spec.offset, box.lower.dtype), box.lower.shape)
    box = Box(box.lower + offset, box.upper + offset)
    if walk.centres:
        lost = _lost_in_rows(walk, spec)
        box = rounding.widen(box, rounding.ARITHMETIC)
        box = Box(box.lower + lost.lower, box.upper + lost.upper)
    return rounding.widen(box, rounding.ARITHMETIC) if walk.outward else box


def _lost_in_rows(walk: Walk, spec: Spec) -> Box:
    """What a spec's rows lose when they are rounded to the type of coefficients, times the outputs,
    (b, s). The difference itself is exact.
    """
    centre, box = walk.centres[walk.output][:, None], walk.boxes[walk.output]
    size = size_of(box, walk.centres[walk.output])[:, None]
    matrix = spec_matrix(spec, walk.output.shape, walk.dtype)
    difference = matrix - matrix.astype(walk.rows_dtype)
    terms, k = difference * centre, size.shape[2]
    errors = rounding.gamma(k + 4) * jnp.abs(terms)
    errors = errors + jnp.where(difference != 0, jnp.abs(difference) * size, 0)
    value, error = jnp.sum(terms, 2), rounding.inflate(jnp.sum(errors, 2), k)
    return rounding.widen(Box(value - error, value + error), rounding.ARITHMETIC)
