"""Known functions, found in a graph by their equations.

Bounding `x * sigmoid(x)` one equation at a time treats the two factors as independent and is loose;
as one function, silu, its range is known exactly. A name proves nothing (a user's function may be
called silu), so an idiom is recognised only where the graph's equations are those of a reference
implementation traced at the same shape. It then stands in the graph as one equation, which keeps
the reference in `inner` for methods without a rule of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.graph import Atom, Equation, Graph, Var, holds_all, prune, same_params, trace
from jaxcert.model import is_traced


@dataclasses.dataclass(frozen=True)
class Idiom:
    """A function to recognise.

    Attributes:
      name: what its equation is called.
      last: the primitive that yields its result, where a match starts.
      reference: the function of the bounded operand and the further ones below.
      scalars: how many scalar constants follow (a slope, say).
      along_axes: whether it sums along axes, which `reference` then takes as `axes`, and the
        equation as its parameter.
      shifted: whether a bounded operand of size 1 along the axes follows.
    """

    name: str
    last: str
    reference: Callable[..., Any]
    scalars: int = 0
    along_axes: bool = False
    shifted: bool = False


# exp(x - m) / sum(exp(x - m)) is softmax(x) for every finite m that is constant along the axes:
# any expression may stand in its place. The same holds for log_softmax.
def _softmax(x, m, *, axes):
    e = jnp.exp(x - m)
    return e / jnp.sum(e, axes, keepdims=True)


def _log_softmax(x, m, *, axes):
    shifted = x - m
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axes, keepdims=True))


def _variance(x, *, axes):
    """As in Flax's normalisation layers: E[x^2] - E[x]^2, cut off at 0."""
    mean_of_squares = jnp.mean(jnp.square(x), axes)
    return jnp.maximum(0.0, mean_of_squares - jnp.square(jnp.mean(x, axes)))


IDIOMS = (
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
    Idiom("softmax", "div", _softmax, along_axes=True, shifted=True),
    Idiom("log_softmax", "sub", _log_softmax, along_axes=True, shifted=True),
    Idiom("variance", "max", _variance, along_axes=True),
)


def simplify(graph: Graph) -> Graph:
    """The graph with every idiom as one equation.

    Only the equation that yields the idiom's result is replaced; the others are dropped unless
    something else reads them.
    """
    producers = {out: eqn for eqn in graph.equations for out in eqn.outputs}
    equations = tuple(_recognise(eqn, producers) for eqn in graph.equations)
    return prune(dataclasses.replace(graph, equations=equations))


def _recognise(eqn: Equation, producers: dict[Var, Equation]) -> Equation:
    if eqn.bounded and jnp.issubdtype(eqn.outputs[0].dtype, jnp.floating):
        for idiom in IDIOMS:
            if idiom.last == eqn.name and (found := _find(idiom, eqn, producers)):
                return found
    return eqn


def _find(idiom: Idiom, eqn: Equation, producers: dict[Var, Equation]) -> Equation | None:
    out, params, shape = eqn.outputs[0], {}, eqn.outputs[0].shape
    if idiom.along_axes:
        total = _nearest_sum(eqn, producers)
        if total is None:
            return None
        shape, params = tuple(total.inputs[0].shape), {"axes": tuple(total.params["axes"])}
        if idiom.shifted and len(params["axes"]) != 1:
            return None
    # Part of the key: how JAX types the numbers written in a reference depends on the x64 mode.
    mode = jnp.dtype(jnp.result_type(float)).name
    reference = _reference(idiom, shape, jnp.dtype(out.dtype).name, params.get("axes"), mode)
    operands = None if _rounds(reference) else _match(reference, out, producers)
    if operands is None:
        return None
    return dataclasses.replace(
        eqn, name=idiom.name, inputs=operands, params=params, primitive=None, inner=reference
    )


def _rounds(reference: Graph) -> bool:
    """Whether a step casts to a narrower type, which the exact function would leave out."""
    casts = (eqn for eqn in reference.equations if eqn.name == "convert_element_type")
    return any(not holds_all(eqn.outputs[0].dtype, eqn.inputs[0].dtype) for eqn in casts)


def _nearest_sum(eqn: Equation, producers: dict[Var, Equation], depth: int = 5) -> Equation | None:
    """The first reduce_sum found going back from an equation, last operands first."""
    for atom in reversed(eqn.inputs):
        source = producers.get(atom) if isinstance(atom, Var) else None
        if source is not None and source.name == "reduce_sum":
            return source
        if (
            source is not None
            and depth > 1
            and (found := _nearest_sum(source, producers, depth - 1))
        ):
            return found
    return None


@functools.lru_cache(maxsize=4096)
def _reference(
    idiom: Idiom, shape: tuple[int, ...], dtype: str, axes: tuple[int, ...] | None, mode: str
) -> Graph:
    x = jax.ShapeDtypeStruct(shape, dtype)
    scalar = jax.ShapeDtypeStruct((), dtype, weak_type=True)
    operands, bounded = [x] + [scalar] * idiom.scalars, [True] + [False] * idiom.scalars
    f = idiom.reference
    if axes is not None:
        f = functools.partial(f, axes=axes)
    if idiom.shifted:
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]  # type: ignore
        operands, bounded = [x, jax.ShapeDtypeStruct(tuple(kept), dtype)], [True, True]
    return trace(f, *operands, bounded=bounded)


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
            and same_params(a.params, b.params)
            and all(same(p, q) for p, q in zip(a.inputs, b.inputs, strict=True))
        )

    if not same(reference.outputs[0], out):
        return None
    return tuple(found[v] for v in reference.inputs)


def _equal(a: Any, b: Any) -> bool:
    """Whether two known arrays are the same; traced ones never are."""
    if is_traced(a, b):
        return a is b
    return a.dtype == b.dtype and np.shape(a) == np.shape(b) and bool(np.array_equal(a, b))
