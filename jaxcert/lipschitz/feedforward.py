"""A model as x -> A_1 -> activation -> A_2 ... -> A_l: the matrices of its affine parts, proved.

The graph of a model is cut at its elementwise activations; whatever lies between two of them (dense
layers, convolutions of any strides and groups, batch normalisation in eval mode, average pooling,
reshapes, concatenations, residual sums of affine parts) is one affine map, whose matrix comes from
the images of the unit vectors in interval arithmetic.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Value, apply_rule, lower, operand, upper
from jaxcert.bounds.planes import is_affine
from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.graph import Equation, Graph, Var, holds_all, unsupported
from jaxcert.lipschitz.chain import stored_weights
from jaxcert.lipschitz.slopes import Slopes, has_slopes, operand_of, slopes
from jaxcert.rows import Rows
from jaxcert.sets import Array, Box
from jaxcert.tracing import Traced

MEMORY = 2**26  # bytes that the images of one chunk of unit vectors may take

_HINT = (
    "covered are chains of affine layers and elementwise activations of known slopes; "
    "lipschitz.constant multiplies the constants of layers and knows other ones"
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """An affine map and the elementwise activations behind it; the last one has none.

    Attributes:
      source: the variable it starts from, (b, *shape).
      target: the affine image.
      equations: from one to the other, without those on weights alone.
      activations: applied to the target in turn.
      batch: the number b of examples.
    """

    source: Var
    target: Var
    equations: tuple[Equation, ...]
    activations: tuple[Equation, ...]
    batch: int


@dataclasses.dataclass(frozen=True)
class Chain:
    """A model as segments, each starting from what the one before ends in.

    Attributes:
      graph: of the whole model.
      segments: in order; none at all if the output does not depend on the input.
    """

    graph: Graph
    segments: tuple[Segment, ...]


Matrices: TypeAlias = list[tuple[Array, Array]]
"""For each segment a float64 matrix (n, d) and how far each entry of the exact one may lie off."""


# --- cutting --------------------------------------------------------------------------------------


def cut(traced: Traced) -> Chain:
    """The segments of a model.

    Raises:
      UnsupportedEquation: an equation is neither affine nor an elementwise activation, or it joins
        values from before and behind an activation.
    """
    graph, rows = traced
    out = graph.outputs[0]
    if not isinstance(out, Var) or not out.bounded:
        return Chain(graph, ())
    sources, targets = [graph.inputs[0]], []
    equations: list[list[Equation]] = [[]]
    activations: list[list[Equation]] = [[]]
    stage = {graph.inputs[0]: 0}
    for eqn in graph.equations:
        if not eqn.bounded:
            continue
        here = _stage_of(eqn, stage)
        if _affine(eqn):
            stage.update(dict.fromkeys(eqn.outputs, here))
            equations[here].append(eqn)
            continue
        _require_activation(eqn, here == len(sources) - 1)
        target = operand_of(eqn)
        if target is sources[-1] and targets:  # straight behind another activation
            activations[-2].append(eqn)
            sources[-1] = eqn.outputs[0]
            stage[eqn.outputs[0]] = here
            continue
        targets.append(target)
        activations[-1].append(eqn)
        sources.append(eqn.outputs[0])
        equations.append([])
        activations.append([])
        stage[eqn.outputs[0]] = here + 1
    parts = zip(sources, [*targets, out], equations, activations, strict=True)
    batch = graph.inputs[0].shape[0]
    segments = tuple(Segment(s, t, tuple(e), tuple(a), batch) for s, t, e, a in parts)
    _require_single_paths(segments)
    _require_examples_first(segments, rows)
    return Chain(graph, segments)


def _affine(eqn: Equation) -> bool:
    if eqn.name == "reduce_precision" or (
        eqn.name == "convert_element_type"
        and not holds_all(eqn.outputs[0].dtype, eqn.inputs[0].dtype)
    ):
        raise unsupported(eqn, "lipschitz", f"it rounds to a narrower type; {_HINT}")
    return is_affine(eqn)


def _stage_of(eqn: Equation, stage: Mapping[Var, int]) -> int:
    found = {stage[a] for a in eqn.inputs if isinstance(a, Var) and a.bounded}
    if len(found) > 1:
        raise unsupported(
            eqn,
            "lipschitz",
            "it joins values from before and behind an activation (a residual connection); "
            "lipschitz.constant covers those",
        )
    return found.pop()


def _require_activation(eqn: Equation, last: bool) -> None:
    if not has_slopes(eqn):
        raise unsupported(eqn, "lipschitz", _HINT)
    if not last:
        raise unsupported(
            eqn,
            "lipschitz",
            "another activation reads the same layer (parallel branches); lipschitz.constant "
            "covers those",
        )


def _require_single_paths(segments: Sequence[Segment]) -> None:
    """Raise where an activation's result, which another one acts on, is read by something else."""
    for segment in segments:
        made = {segment.source, *(out for eqn in segment.equations for out in eqn.outputs)}
        for eqn in segment.equations:
            if any(isinstance(a, Var) and a.bounded and a not in made for a in eqn.inputs):
                raise unsupported(
                    eqn,
                    "lipschitz",
                    "it reads a value from between two activations in a row; lipschitz.constant "
                    "covers that",
                )


def _require_examples_first(segments: Sequence[Segment], rows: Mapping[Var, Rows]) -> None:
    for segment in segments:
        for v in (segment.source, segment.target):
            if rows[v] != Rows(0):
                eqn = next(e for s in segments for e in (*s.equations, *s.activations) if v in (
                    *e.inputs, *e.outputs))  # fmt: skip
                hint = "keep the batch axis first where activations are applied"
                raise unsupported(eqn, "lipschitz", hint)


# --- matrices -------------------------------------------------------------------------------------
# An affine map A has A(e_j) - A(0) for the column j of its matrix. Interval arithmetic encloses
# both, hence the difference. The unit vector is put into every row of the batch, and what the rows
# give is joined: should rows have different weights, the matrices of all of them are enclosed.


def matrices(chain: Chain) -> Matrices:
    """Proved enclosures of the segments' matrices. Only inside `enable_x64`.

    Memory: 16 n d bytes for each, and 64 MiB for a chunk of unit vectors, or one of them.
    """
    known = stored_weights(chain.graph)
    return [_matrix(segment, known) for segment in chain.segments]


def _matrix(segment: Segment, known: Mapping[Var, Value]) -> tuple[Array, Array]:
    at_zero = _through(segment, known, -1, True)

    def column(j: Array) -> tuple[Array, Array]:
        image = _through(segment, known, j, True)
        low, high = lower(image) - upper(at_zero), upper(image) - lower(at_zero)
        slack = 4 * UNIT * (jnp.abs(low) + jnp.abs(high)) + TINY
        low, high = jnp.min(low - slack, 0), jnp.max(high + slack, 0)
        middle = low + (high - low) / 2
        radius = jnp.maximum(high - middle, middle - low)
        return middle, radius * (1 + 4 * UNIT) + TINY

    middle, radius = _over_columns(segment, column)
    return middle.T, radius.T


def plain_matrices(chain: Chain) -> list[Array]:
    """The matrices (n, d) in the model's own type, differentiable; not a proof."""
    known = stored_weights(chain.graph, outward=False)
    found = []
    for segment in chain.segments:
        at_zero = _through(segment, known, -1, False)[0]
        column = functools.partial(_image, segment, known, at_zero)
        found.append(_over_columns(segment, column).T)
    return found


def _image(segment: Segment, known: Mapping[Var, Value], at_zero: Array, j: Array) -> Array:
    return _through(segment, known, j, False)[0] - at_zero


def _over_columns(segment: Segment, column: Any) -> Any:
    sizes = [math.prod(out.shape) for eqn in segment.equations for out in eqn.outputs]
    widest = max([math.prod(segment.source.shape), *sizes])
    d = math.prod(segment.source.shape) // segment.batch
    chunk = max(1, min(d, MEMORY // (64 * widest)))
    return jax.lax.map(column, jnp.arange(d), batch_size=chunk)


def _through(segment: Segment, known: Mapping[Var, Value], j: Any, outward: bool) -> Value:
    """The image of e_j, of 0 for j = -1, in each row of the batch: a `Box` or an array (b, n).

    The examples are the outermost factor of every shape, whether they have an axis of their own or
    share it with tokens.
    """
    b, shape = segment.batch, segment.source.shape
    dtype = jnp.float64 if outward else segment.source.dtype
    unit = (jnp.arange(math.prod(shape) // b) == j).astype(dtype)
    x = jnp.broadcast_to(unit, (b, *unit.shape)).reshape(shape)
    values = {**known, segment.source: Box(x, x) if outward else x}
    for eqn in segment.equations:
        operands = [operand(values, atom, outward) for atom in eqn.inputs]
        values.update(zip(eqn.outputs, apply_rule(eqn, operands, outward), strict=True))
    return jax.tree.map(lambda end: end.reshape(b, -1), values[segment.target])


# --- slopes ---------------------------------------------------------------------------------------


def slopes_of(
    chain: Chain, known: dict[Var, Value], boxes: Mapping[Var, Box] | None
) -> list[Slopes]:
    """For each segment but the last, bounds (b, n) on the slopes of what is applied behind it.

    Args:
      known: from `chain.stored_weights`.
      boxes: of the activations' operands; None for slopes on the whole space.
    """
    found = []
    for segment in chain.segments[:-1]:
        each = [_slopes_of_one(eqn, known, boxes) for eqn in segment.activations]
        least, most = functools.reduce(_composed, each)
        found.append((least.reshape(segment.batch, -1), most.reshape(segment.batch, -1)))
    return found


def _slopes_of_one(
    eqn: Equation, known: dict[Var, Value], boxes: Mapping[Var, Box] | None
) -> Slopes:
    bounded = operand_of(eqn)
    values = [None if atom is bounded else operand(known, atom, True) for atom in eqn.inputs]
    return slopes(eqn, values, None if boxes is None else boxes[bounded])


def _composed(first: Slopes, second: Slopes) -> Slopes:
    """The chain rule: the slopes of one function after another are products."""
    products = [a * b for a in first for b in second]
    slack = 4 * UNIT * functools.reduce(jnp.maximum, map(jnp.abs, products)) + TINY
    low, high = functools.reduce(jnp.minimum, products), functools.reduce(jnp.maximum, products)
    return low - slack, high + slack
