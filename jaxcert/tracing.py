"""Models as checked graphs: the one way from a user's function to equations that can be bounded."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert import blocks
from jaxcert.errors import StatefulModel
from jaxcert.graph import Equation, Graph, Var, entered, same_params, trace
from jaxcert.idioms import simplify
from jaxcert.model import Model, Structure, as_float64, is_traced, split
from jaxcert.rows import Rows, check

Traced = tuple[Graph, dict[Var, Rows]]


def trace_rows(f: Model, shape: tuple[int, ...], dtype: Any, *, whole: bool = False) -> Traced:
    """The graph of a model at inputs (b, *input), and where each bounded value has its examples.

    The function is also traced at batch 2 where b is 1: there an axis of size 1 could hide that
    rows mix, or a model could behave differently for a batch of one.

    Args:
      f: the model.
      shape, dtype: of the inputs.
      whole: whether blocks (`blocks.py`) stay whole in the graph; their insides are checked.
    """
    if not shape or shape[0] < 1:
        raise ValueError(f"the batch must hold at least one example, got shape {shape}")
    arrays, structure = split(f)
    counters: set[int] = set()

    def rebuilt(x):  # rebuilt under the trace, so that a module may update its own state there
        model = structure.build(arrays)
        result = model(x)
        after = split(model)[0]
        counters.update(i for i, a in enumerate(arrays) if a is not after[i] and _counts(a))
        return result

    if shape[0] == 1:
        pair = (2, *shape[1:])
        check(simplify(trace(rebuilt, jax.ShapeDtypeStruct(pair, dtype))), batch=2)
    traced = trace(rebuilt, jax.ShapeDtypeStruct(shape, dtype))
    graph = simplify(traced if whole else entered(traced))
    _require_repeatable(structure, arrays, sorted(counters), jax.ShapeDtypeStruct(shape, dtype))
    if len(graph.outputs) != 1:
        raise TypeError(
            f"the model must return one array of logits (b, k), got {len(graph.outputs)} arrays"
        )
    if shape[0] == 1:
        # A single example mixes with nothing, and its axis may come and go: jnp.matmul drops it.
        values = [graph.inputs[0], *(out for eqn in graph.equations for out in eqn.outputs)]
        return graph, {v: Rows(0) if v.shape[:1] == (1,) else Rows(-1) for v in values if v.bounded}
    return graph, check(graph, batch=shape[0])


def may_see_place(f: Model, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether what becomes of one input (*input) may depend on its row in the batch.

    It can only through numbers that are not made of inputs and come one per row, such as a mask of
    the batch's shape: through an operand whose size is another in a larger batch.

    Raises:
      As `trace_rows`.
    """
    sizes = [
        [
            (eqn.name, jnp.shape(operand))
            for eqn in trace_rows(f, (b, *shape), dtype)[0].equations
            for operand in eqn.inputs
            if eqn.bounded and not getattr(operand, "bounded", False)
        ]
        for b in (2, 3)
    ]
    return sizes[0] != sizes[1]


def _counts(array: Any) -> bool:
    """Whether an array can drive random numbers: integers and keys."""
    kinds = (jnp.integer, jax.dtypes.prng_key)
    return any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def _require_repeatable(
    structure: Structure, arrays: Sequence[Any], counters: Sequence[int], x: jax.ShapeDtypeStruct
) -> None:
    """Raise if the output depends on counters that each call moves on, as active dropout does."""
    if not counters:
        return

    def counted(x, *values):
        moved = list(arrays)
        for i, value in zip(counters, values, strict=True):
            moved[i] = value
        return structure.build(moved)(x)

    states = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in counters]
    graph = trace(counted, x, *states, bounded=[True] + [False] * len(states))
    read = {id(atom) for eqn in graph.equations for atom in eqn.inputs}
    if any(id(state) in read for state in graph.inputs[1:]):
        raise StatefulModel(
            "the model's output depends on a counter that every call moves on, so each call is "
            "another function; active dropout is the usual cause: call model.eval() first, or "
            "build it with deterministic=True"
        )


# --- The same model in float64 --------------------------------------------------------------------
#
# A proof is about real arithmetic, so it should see 0.01 where the code says 0.01, and not the
# float32 number next to it: the model is traced in float64. That must not make it another function,
# though. Code that draws random numbers, or computes with integers, in JAX's default types computes
# something else in float64 mode; a recurrent cell that starts from float32 zeros cannot be traced
# in it. Where the two traces differ in more than the rounding of known numbers, the caller's own
# counts. The rules compute in float64 either way.


def trace_float64(
    structure: Structure,
    arrays: Sequence[Any],
    shape: tuple[int, ...],
    dtype: Any,
    mode: bool,
    *,
    whole: bool = False,
) -> Traced:
    """The checked graph of a model for a proof. Only inside `enable_x64`.

    Args:
      structure, arrays: the model.
      shape: of the inputs, (b, *input).
      dtype: float type of the inputs as the caller has them.
      mode: whether the caller is in JAX's x64 mode.
      whole: whether blocks stay whole, as in `trace_rows`.
    """
    truncated = list(arrays) if mode else [_truncated(array) for array in arrays]
    own_dtype = dtype if mode or dtype != jnp.float64 else jnp.float32
    with jax.enable_x64(mode):
        own = trace_rows(structure.build(truncated), shape, own_dtype, whole=whole)
    # What is computed with integers under a surrounding trace cannot be compared below.
    integers = any(jnp.issubdtype(array.dtype, jnp.signedinteger) for array in arrays)
    if integers or own[0].random or _is_float64(truncated, own_dtype):
        return own
    try:
        model = structure.build(as_float64(list(arrays)))
        wide = trace_rows(model, shape, jnp.float64, whole=whole)
    except TypeError:
        return own
    if not _same_function(own[0], wide[0]):
        return own
    return _with_weights_of(own[0], wide[0]), wide[1]


def _with_weights_of(own: Graph, wide: Graph) -> Graph:
    """The wide graph with parametrised weights computed as the model itself computes them."""
    computed = iter([e.inner for e in own.equations if e.name == blocks.WEIGHTS])
    equations = [
        dataclasses.replace(e, params={"own": next(computed)}) if e.name == blocks.WEIGHTS else e
        for e in wide.equations
    ]
    return dataclasses.replace(wide, equations=tuple(equations))


def _is_float64(arrays: Sequence[Any], dtype: Any) -> bool:
    floats = [array.dtype for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    return all(kind == jnp.float64 for kind in (*floats, dtype))


def _truncated(array: Any) -> Any:
    """A float64 array as the operations of a caller in float32 mode read it."""
    return jnp.asarray(array).astype(jnp.float32) if array.dtype == jnp.float64 else array


def _same_function(own: Graph, wide: Graph) -> bool:
    """Whether two graphs are the same but for float types and the rounding of known numbers."""
    first, second = _Steps(own), _Steps(wide)
    pairs = zip(first.equations, second.equations, strict=False)
    twins: dict[Any, Any] = dict(zip(own.inputs, wide.inputs, strict=True))

    def same(p: Any, q: Any) -> bool:
        p, q = first.source(p), second.source(q)
        if isinstance(p, Var) or isinstance(q, Var):
            return twins.get(p) is q
        return _same_number(p, q)

    for a, b in pairs:
        if not (
            a.name == b.name
            and len(a.inputs) == len(b.inputs)
            and same_params(a.params, b.params, but_types=True)
            and all(same(p, q) for p, q in zip(a.inputs, b.inputs, strict=True))
            and all(_alike(p, q) for p, q in zip(a.outputs, b.outputs, strict=True))
        ):
            return False
        twins.update(zip(a.outputs, b.outputs, strict=True))
    return len(first.equations) == len(second.equations) and same(own.outputs[0], wide.outputs[0])


class _Steps:
    """The equations of a graph without its casts between float types."""

    def __init__(self, graph: Graph):
        casts = [e for e in graph.equations if e.name == "convert_element_type" and _floats(e)]
        self._casts = {e.outputs[0]: e.inputs[0] for e in casts}
        self.equations = [e for e in graph.equations if e not in casts]

    def source(self, atom: Any) -> Any:
        """The atom behind any casts."""
        while isinstance(atom, Var) and atom in self._casts:
            atom = self._casts[atom]
        return atom


def _floats(eqn: Equation) -> bool:
    return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (*eqn.inputs, *eqn.outputs))


def _alike(p: Var, q: Var) -> bool:
    both_float = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (p, q))
    return tuple(p.shape) == tuple(q.shape) and (both_float or p.dtype == q.dtype)


def _same_number(p: Any, q: Any) -> bool:
    floats = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (p, q))
    if tuple(p.shape) != tuple(q.shape) or (p.dtype != q.dtype and not floats):
        return False
    if is_traced(p, q):  # weights, or made of them without arithmetic; integers might have wrapped
        return floats or p is q
    if not floats:
        return bool(np.array_equal(p, q))
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    with np.errstate(invalid="ignore"):
        return bool(np.all((a == b) | (np.abs(a - b) <= 1e-6 * np.abs(b))))
