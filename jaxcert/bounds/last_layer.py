"""A spec, folded into the last weight layer.

The output is y = A(h) with A affine: the last weight layer and what follows it. Then
C y + d = (C A') h + C A(0) + d with A' the linear part, so the rows of C are pulled back through A'
and meet the box of h once, instead of meeting the box of y (Gowal et al., ICCV 2019, section 3).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.interpreter import Value, interpret, lower, operand, output
from jaxcert.bounds.products import affine, exact_products
from jaxcert.graph import Atom, Equation, Graph, Var, read, trace
from jaxcert.model import as_float64
from jaxcert.rows import Rows
from jaxcert.sets import Array, Box
from jaxcert.specs import Spec

_SHIFTS = {"add", "sub", "neg", "reshape", "transpose", "squeeze", "broadcast_in_dim"}
_SCALES = {"mul", "dot_general", "conv_general_dilated"}  # only by weights that are exactly known
_LAYERS = {"dot_general", "conv_general_dilated"}


def with_spec(graph: Graph, rows: dict[Var, Rows], box: Box, spec: Spec, outward: bool) -> Box:
    """Bounds (b, s) on C f(x) + d over the box."""
    head, tail = _split_last_layer(graph, rows)
    env = interpret(head, [box], outward)
    hidden = operand(env, head.outputs[0], outward)
    constants = {v: env[v] for v in env if not v.bounded}
    zero = jnp.zeros_like(lower(hidden))
    bias = output(_with_inputs(tail, constants), [zero, *constants.values()], outward)
    matrix = spec_matrix(spec, jnp.shape(lower(bias)), lower(bias).dtype)
    b, k = jnp.shape(lower(bias))
    pulled = _pull_back(tail, jnp.moveaxis(matrix, 1, 0), outward)
    pulled = _map(pulled, lambda a: jnp.moveaxis(a, 1, 0).reshape(b, matrix.shape[1], -1))
    flat = _map(hidden, lambda a: a.reshape(b, -1))
    linear = affine(_contract, flat, pulled, lower(flat).shape[1], outward)
    constant = affine(_contract, bias, matrix, k, outward)
    offset = jnp.broadcast_to(jnp.asarray(spec.offset, linear.lower.dtype), linear.lower.shape)
    total = Box(linear.lower + constant.lower + offset, linear.upper + constant.upper + offset)
    if not outward:
        return total
    # Two additions: each errs by at most u times the sizes that went in.
    size = jnp.maximum(jnp.abs(linear.lower), jnp.abs(linear.upper)) + jnp.abs(offset)
    size = size + jnp.maximum(jnp.abs(constant.lower), jnp.abs(constant.upper))
    slack = rounding.inflate(size * rounding.gamma(4), 4)
    return rounding.widen(Box(total.lower - slack, total.upper + slack), rounding.ARITHMETIC)


def _contract(hidden: Array, matrix: Array) -> Array:
    """(b, h) and (b, s, h) to (b, s); not by einsum, which writes the result type out."""
    return jax.lax.dot_general(
        matrix, hidden, (((2,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )


def _map(value: Value, f: Callable[[Array], Array]) -> Value:
    return Box(f(value.lower), f(value.upper)) if isinstance(value, Box) else f(value)


def spec_matrix(spec: Spec, shape: Sequence[int], dtype: Any) -> Array:
    """The matrix of a spec for each example of outputs (b, k), (b, s, k)."""
    if len(shape) != 2:
        raise ValueError(f"a spec needs a model with outputs (b, k), got {tuple(shape)}")
    b, k = shape
    matrix = jnp.asarray(spec.matrix, dtype)
    if matrix.ndim > 1 and matrix.shape[-2] == 0:
        raise ValueError("the spec has no rows, so there is nothing to prove")
    if (
        matrix.ndim not in (2, 3)
        or matrix.shape[-1] != k
        or matrix.shape[0] != (b if matrix.ndim == 3 else matrix.shape[0])
    ):
        raise ValueError(
            f"the spec's matrix must be (s, {k}) or ({b}, s, {k}) for this model, "
            f"got {matrix.shape}"
        )
    return jnp.broadcast_to(matrix, (b, *matrix.shape[-2:]))


def _split_last_layer(graph: Graph, rows: dict[Var, Rows]) -> tuple[Graph, Graph]:
    """The graph as (everything before the last weight layer, that layer and what follows)."""
    producers = {out: eqn for eqn in graph.equations for out in eqn.outputs}
    current, tail, end = graph.outputs[0], [], graph.outputs[0]
    cut = 0
    while isinstance(current, Var) and current in producers:
        eqn = producers[current]
        bounded = [a for a in eqn.inputs if isinstance(a, Var) and a.bounded]
        known = all(not isinstance(a, Var) or a.bounded for a in eqn.inputs)
        affine_in_one = eqn.name in _SHIFTS or (eqn.name in _SCALES and known)
        if len(bounded) != 1 or not affine_in_one:
            break
        tail.append(eqn)
        current = bounded[0]
        # Each example's part must be a row of its own, to be flattened above.
        if rows[current] == Rows(0) and current.shape[0] == graph.inputs[0].shape[0]:
            cut, end = len(tail), current
        if eqn.name in _LAYERS:
            break
    chain = tuple(reversed(tail[:cut]))
    head = dataclasses.replace(graph, outputs=(end, *_constants_of(chain)))
    kept = tuple(eqn for eqn in graph.equations if eqn not in chain)
    head = dataclasses.replace(head, equations=kept)
    return head, Graph((end,), chain, graph.outputs)  # type: ignore[arg-type]


def _constants_of(chain: Sequence[Equation]) -> list[Var]:
    return [a for eqn in chain for a in eqn.inputs if isinstance(a, Var) and not a.bounded]


def _with_inputs(graph: Graph, more: Iterable[Var]) -> Graph:
    """A part of a graph, with constants that are computed elsewhere as further inputs."""
    return dataclasses.replace(graph, inputs=(*graph.inputs, *more))


def _pull_back(tail: Graph, rows: Array, outward: bool) -> Value:
    """Rows (s, b, k) on the output as rows (s, b, *hidden) on the tail's input."""
    hidden = tail.inputs[0]

    def linear_part(h: Array) -> Array:
        env: dict[Var, Any] = {hidden: h}
        for eqn in tail.equations:
            # Added constants do not matter for the derivative; zeros stand for them.
            values = [_known(env, a, h.dtype) for a in eqn.inputs]
            options = exact_products(outward) if eqn.name in _LAYERS else {}
            env.update(zip(eqn.outputs, eqn.bind(*values, **options), strict=True))
        return read(env, tail.outputs[0])

    def pull(rows: Array) -> Array:
        _, vjp = jax.vjp(linear_part, jnp.zeros(hidden.shape, rows.dtype))
        return jax.vmap(lambda row: vjp(row)[0])(rows)

    if not outward:
        return pull(rows)
    return output(trace(pull, rows), [rows], outward)


def _known(env: dict[Var, Any], atom: Atom, dtype: Any) -> Any:
    if isinstance(atom, Var):
        return env[atom] if atom in env else jnp.zeros(atom.shape, dtype)
    return as_float64(jnp.asarray(atom)).astype(dtype) if dtype == jnp.float64 else atom
