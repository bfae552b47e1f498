"""Known functions, found in a graph by their equations.

Bounding `x * sigmoid(x)` one equation at a time treats the two factors as independent and is loose;
as one function, silu, its range is known exactly. A name proves nothing (a user's function may be
called silu), so an idiom is recognised only where the graph's equations are those of a reference
implementation traced at the same shape. It then stands in the graph as one equation, which keeps
the reference in `inner` for methods without a rule of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.graph import Atom, Equation, Graph, Var, prune, trace
from jaxcert.model import is_traced


@dataclasses.dataclass(frozen=True)
class Idiom:
    """A function to recognise.

    Attributes:
      name: what its equation is called.
      last: the primitive that yields its result, where a match starts.
      reference: the function of the bounded operand, then of `scalars` constants.
      scalars: how many scalar constants follow (a slope, say); the equation gets them as operands.
    """

    name: str
    last: str
    reference: Callable[..., Any]
    scalars: int = 0


@dataclasses.dataclass(frozen=True)
class AxisIdiom:
    """A function that normalises along an axis, whatever shift `m` it subtracts first.

    Attributes:
      name: what its equation is called; its parameter `axis` says along which axis.
      last: the primitive that yields its result.
      reference: the function of (x, m, axis), m having size 1 along the axis.
    """

    name: str
    last: str
    reference: Callable[..., Any]


# exp(x - m) / sum(exp(x - m)) is softmax(x) for every finite m that is constant along the axis, so
# the equation drops m: any expression may stand in its place. The same holds for log_softmax.
def _softmax(x, m, axis):
    e = jnp.exp(x - m)
    return e / jnp.sum(e, axis, keepdims=True)


def _log_softmax(x, m, axis):
    shifted = x - m
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))


IDIOMS: list[Idiom | AxisIdiom] = [
    Idiom("relu", "select_n", lambda x: jnp.where(x > 0, x, 0.0)),
    Idiom("relu", "select_n", lambda x: jnp.where(x >= 0, x, 0.0)),
    Idiom("leaky_relu", "select_n", jax.nn.leaky_relu, scalars=1),
    Idiom("leaky_relu", "select_n", lambda x, a: jnp.where(x >= 0, x, x * a), scalars=1),
    Idiom("leaky_relu", "select_n", lambda x, a: jnp.where(x > 0, x, a * x), scalars=1),
    Idiom("leaky_relu", "select_n", lambda x, a: jnp.where(x > 0, x, x * a), scalars=1),
    Idiom("elu", "select_n", jax.nn.elu, scalars=1),
    Idiom("softplus", "select_n", jax.nn.softplus),
    Idiom("silu", "mul", jax.nn.silu),
    Idiom("gelu_tanh", "mul", functools.partial(jax.nn.gelu, approximate=True)),
    Idiom("gelu_erf", "mul", functools.partial(jax.nn.gelu, approximate=False)),
    Idiom("mish", "mul", jax.nn.mish),
    Idiom("hard_swish", "mul", jax.nn.hard_swish),
    Idiom("square", "mul", lambda x: x * x),
    Idiom("soft_sign", "div", jax.nn.soft_sign),
    AxisIdiom("softmax", "div", _softmax),
    AxisIdiom("log_softmax", "sub", _log_softmax),
]


def simplify(graph: Graph) -> Graph:
    """The graph with every idiom as one equation.

    Only the equation that yields the idiom's result is replaced; the others are dropped unless
    something else reads them.
    """
    producers = {out: eqn for eqn in graph.equations for out in eqn.outputs}
    equations = tuple(_recognise(eqn, producers) for eqn in graph.equations)
    return prune(dataclasses.replace(graph, equations=equations))


def _recognise(eqn: Equation, producers: dict[Var, Equation]) -> Equation:
    if eqn.bounded:
        out = eqn.outputs[0]
        for idiom in IDIOMS:
            if idiom.last == eqn.name:
                for axis, reference in _references(idiom, out.shape, jnp.dtype(out.dtype).name):
                    if operands := _match(reference, out, producers):
                        kept = operands if isinstance(idiom, Idiom) else operands[:1]
                        params = {} if axis is None else {"axis": axis}
                        return dataclasses.replace(
                            eqn, name=idiom.name, inputs=kept, params=params, primitive=None,
                            inner=_as_function(idiom, axis, kept, out),
                        )  # fmt: skip
    return eqn


@functools.lru_cache(maxsize=4096)
def _references(
    idiom: Idiom | AxisIdiom, shape: tuple[int, ...], dtype: str
) -> tuple[tuple[int | None, Graph], ...]:
    """The reference traced at a shape, for an axis idiom once per axis."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    if isinstance(idiom, Idiom):
        scalar = jax.ShapeDtypeStruct((), dtype, weak_type=True)
        bounded = [True] + [False] * idiom.scalars
        return ((None, trace(idiom.reference, x, *[scalar] * idiom.scalars, bounded=bounded)),)
    return tuple(_per_axis(idiom, shape, dtype))


def _per_axis(idiom: AxisIdiom, shape: tuple[int, ...], dtype: str) -> Iterator[tuple[int, Graph]]:
    x = jax.ShapeDtypeStruct(shape, dtype)
    for axis in range(len(shape)):
        m = jax.ShapeDtypeStruct((*shape[:axis], 1, *shape[axis + 1 :]), dtype)
        yield axis, trace(functools.partial(idiom.reference, axis=axis), x, m)


def _as_function(
    idiom: Idiom | AxisIdiom, axis: int | None, operands: tuple[Atom, ...], out: Var
) -> Graph:
    """The idiom as a graph of the operands its equation has."""
    dtype = jnp.dtype(out.dtype).name
    if isinstance(idiom, Idiom):
        return _references(idiom, out.shape, dtype)[0][1]
    safe = getattr(jax.nn, idiom.name)  # with the shift that keeps exp from overflowing
    return trace(lambda x: safe(x, axis=axis), jax.ShapeDtypeStruct(out.shape, dtype))


def _match(reference: Graph, out: Var, producers: dict[Var, Equation]) -> tuple[Atom, ...] | None:
    """The atoms that stand for the reference's inputs if `out` is computed as in the reference."""
    ours = {o: eqn for eqn in reference.equations for o in eqn.outputs}
    found: dict[Var, Atom] = {}

    def same(wanted: Atom, given: Atom) -> bool:
        if not isinstance(wanted, Var):
            return not isinstance(given, Var) and _equal(wanted, given)
        if wanted in found:
            return found[wanted] is given
        if wanted not in ours:  # an input of the reference
            fits = tuple(wanted.shape) == tuple(given.shape) and wanted.dtype == given.dtype
            found[wanted] = given
            return fits and (wanted.bounded or not isinstance(given, Var) or not given.bounded)
        if not isinstance(given, Var) or given not in producers:
            return False
        a, b = ours[wanted], producers[given]
        found[wanted] = given
        return (
            a.name == b.name
            and len(a.inputs) == len(b.inputs)
            and a.outputs.index(wanted) == b.outputs.index(given)
            and _same_params(a.params, b.params)
            and all(same(p, q) for p, q in zip(a.inputs, b.inputs, strict=True))
        )

    if not same(reference.outputs[0], out):
        return None
    return tuple(found[v] for v in reference.inputs)


def _same_params(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(bool(np.all(a[key] == b[key])) for key in a)


def _equal(a: Any, b: Any) -> bool:
    """Whether two known arrays are the same; traced ones never are."""
    if is_traced(a, b):
        return a is b
    return a.dtype == b.dtype and np.shape(a) == np.shape(b) and bool(np.array_equal(a, b))
