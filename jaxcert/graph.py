"""Models as flat graphs: a traced function as equations without calls, loops or dead code.

`trace(f, x)` runs the function abstractly, enters jit, custom derivatives, remat and scan, picks or
merges the branches of cond, folds what is exactly known, drops what nothing reads, and checks that
the rows of the batch stay apart (`rows.py`). Every bound propagator walks the resulting `Graph`.

An equation is *bounded* if its value depends on the input. Float arithmetic on weights alone stays
in the graph as unbounded equations, because a proof must count its rounding too; integers and pure
data movement are folded away.

This is the only file that touches JAX's program representation (`jax.extend.core`).
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcert import blocks
from jaxcert.errors import DataDependent, UnsupportedEquation
from jaxcert.model import is_traced

Array: TypeAlias = jax.Array


HERE = os.path.dirname(__file__).replace("\\", "/") + "/"


@dataclasses.dataclass(frozen=True, eq=False)
class Var:
    """A value of the graph that is not known when tracing; compared by identity."""

    shape: tuple[int, ...]
    dtype: Any
    bounded: bool  # whether it depends on the input


Atom: TypeAlias = Var | Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """outputs = name(inputs), one step of a graph.

    `primitive` is JAX's primitive; it is None where the equation stands for a known function
    (`idioms.py`, `blocks.py`) whose own equations are then in `inner`. Parametrised weights of a
    float64 graph have the model's own program for them as the parameter `own`.
    """

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    params: dict[str, Any]
    primitive: Any = None
    source: tuple[Any, ...] = ()  # where it was called from, innermost first
    inner: "Graph | None" = None

    @property
    def bounded(self) -> bool:
        """Whether any output depends on the input."""
        return any(out.bounded for out in self.outputs)

    def bind(self, *values: Any, **overrides: Any) -> list[Any]:
        """The outputs at concrete or traced values, with some parameters replaced."""
        if self.name == blocks.WEIGHTS and self.inner is not None:
            return stored(self.params.get("own", self.inner), values, self.outputs)
        if self.inner is not None:
            return evaluate(self.inner, *values)
        return _bind(self.primitive, values, {**self.params, **overrides})

    def where(self) -> str:
        """Where in the user's model the equation came from, for error messages."""
        return _where(*self.source)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A function as equations in order of evaluation."""

    inputs: tuple[Var, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    random: bool = False  # whether random numbers are drawn in it, even from a constant key


def trace(f: Callable[..., Any], *specs: Any, bounded: Sequence[bool] | None = None) -> Graph:
    """The graph of f at arguments of the given shapes and dtypes.

    Args:
      f: a function of arrays returning an array or a tuple of arrays.
      *specs: arrays or `jax.ShapeDtypeStruct`s, one per argument.
      bounded: which arguments count as the bounded input; all by default.
    """
    closed = jax.make_jaxpr(lambda *args: f(*args))(*specs)
    flags = [True] * len(specs) if bounded is None else list(bounded)
    jaxpr, _ = _open(closed)
    random = any("random" in name or "threefry" in name for name in _names(jaxpr))
    graph = _inside(closed, [v.aval for v in jaxpr.invars], flags)
    return dataclasses.replace(graph, random=random)


def prune(graph: Graph) -> Graph:
    """The graph without equations that no output depends on."""
    live = {atom for atom in graph.outputs if isinstance(atom, Var)}
    kept = []
    for eqn in reversed(graph.equations):
        if any(out in live for out in eqn.outputs):
            kept.append(eqn)
            live.update(atom for atom in eqn.inputs if isinstance(atom, Var))
    return dataclasses.replace(graph, equations=tuple(reversed(kept)))


def entered(graph: Graph) -> Graph:
    """The graph with the equations of each block in its place."""
    equations: list[Equation] = []
    renamed: dict[Var, Atom] = {}
    for eqn in graph.equations:
        inputs = tuple(renamed.get(a, a) if isinstance(a, Var) else a for a in eqn.inputs)
        eqn = dataclasses.replace(eqn, inputs=inputs)
        if eqn.name in blocks.REFERENCES and eqn.inner is not None:
            start = len(equations)
            renamed[eqn.outputs[0]] = splice(eqn.inner, inputs, equations)
            equations[start:] = [
                dataclasses.replace(e, source=e.source + eqn.source) for e in equations[start:]
            ]
        else:
            equations.append(eqn)
    outputs = tuple(renamed.get(a, a) if isinstance(a, Var) else a for a in graph.outputs)
    return dataclasses.replace(graph, equations=tuple(equations), outputs=outputs)


def splice(part: Graph, inputs: Sequence[Atom], out: list[Equation]) -> Var:
    """Append the equations of a graph with these inputs in place of its own; its first output."""
    names: dict[Var, Atom] = dict(zip(part.inputs, inputs, strict=True))
    for eqn in part.equations:
        given = tuple(names.get(a, a) if isinstance(a, Var) else a for a in eqn.inputs)
        out.append(dataclasses.replace(eqn, inputs=given))
    result = part.outputs[0]
    assert isinstance(result, Var)
    return result


def identical(first: Graph, second: Graph) -> bool:
    """Whether two graphs compute the same with the same equations in the same order."""
    twins: dict[Any, Any] = dict(zip(first.inputs, second.inputs, strict=True))

    def same(p: Atom, q: Atom) -> bool:
        if isinstance(p, Var) or isinstance(q, Var):
            return isinstance(p, Var) and twins.get(p) is q
        if is_traced(p, q) or p.dtype != q.dtype:
            return p is q
        return bool(np.array_equal(p, q))

    for a, b in zip(first.equations, second.equations, strict=False):
        if not (
            a.name == b.name
            and same_params(a.params, b.params)
            and len(a.inputs) == len(b.inputs)
            and all(map(same, a.inputs, b.inputs))
            and [(v.shape, v.dtype) for v in a.outputs] == [(v.shape, v.dtype) for v in b.outputs]
            and (a.inner is b.inner or (a.inner and b.inner and identical(a.inner, b.inner)))
        ):
            return False
        twins.update(zip(a.outputs, b.outputs, strict=True))
    return (
        len(first.equations) == len(second.equations)
        and len(first.outputs) == len(second.outputs)
        and all(map(same, first.outputs, second.outputs))
    )


def evaluate(graph: Graph, *values: Any) -> list[Any]:
    """The graph's outputs at plain arrays."""
    env: dict[Var, Any] = dict(zip(graph.inputs, values, strict=True))
    for eqn in graph.equations:
        results = eqn.bind(*[read(env, atom) for atom in eqn.inputs])
        env.update(zip(eqn.outputs, results, strict=True))
    return [read(env, atom) for atom in graph.outputs]


def stored(graph: Graph, values: Sequence[Any], outputs: Sequence[Var]) -> list[Any]:
    """Parametrised weights, computed in the float types of a graph of their parametrisation."""
    own = [jnp.asarray(v).astype(a.dtype) for v, a in zip(values, graph.inputs, strict=True)]
    results = evaluate(graph, *own)
    return [jnp.asarray(r).astype(o.dtype) for r, o in zip(results, outputs, strict=True)]


def read(env: dict[Var, Any], atom: Atom) -> Any:
    """The value of an atom: a known array stands for itself."""
    return env[atom] if isinstance(atom, Var) else atom


def same_params(a: dict[str, Any], b: dict[str, Any], *, but_types: bool = False) -> bool:
    """Whether two equations have the same parameters, result types written out in them or not."""

    def same(p: Any, q: Any) -> bool:
        equal = p == q
        return (
            equal if isinstance(equal, bool) else bool(np.shape(p) == np.shape(q) and np.all(equal))
        )

    keys = (key for key in a if not (but_types and key.endswith(("dtype", "element_type"))))
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in keys)


def holds_all(wide: Any, narrow: Any) -> bool:
    """Whether a float type represents every normal number of another one."""
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return bool(a.nmant >= b.nmant and a.max >= b.max and a.tiny <= b.tiny)


def unsupported(eqn: Equation, method: str, hint: str) -> UnsupportedEquation:
    """The error for an equation that a method has no rule for."""
    shapes = ", ".join(
        str(jnp.shape(a)) if not isinstance(a, Var) else str(a.shape) for a in eqn.inputs
    )
    return UnsupportedEquation(
        f"{method} has no rule for the primitive '{eqn.name}' on operands {shapes} "
        f"({eqn.where()}); {hint}"
    )


# --- Flattening -----------------------------------------------------------------------------------

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}

_IDENTITIES = frozenset({"copy", "copy_p", "sharding_constraint", "optimization_barrier"})

# Elementwise primitives that stretch operands of size 1 without saying so.
_BROADCASTING = frozenset(
    "add sub mul div max min pow select_n clamp lt le gt ge eq ne and or xor atan2 rem".split()
)

# Primitives without arithmetic: on known arrays their result is exact, so it is known too.
_EXACT = frozenset(
    """
    reshape broadcast_in_dim transpose squeeze expand_dims slice concatenate rev pad gather tile
    dynamic_slice split stack unstack select_n neg abs sign max min clamp iota stop_gradient
    convert_element_type bitcast_convert_type random_bits random_wrap random_unwrap random_fold_in
    random_split is_finite scatter reduce_max reduce_min sort lt le gt ge eq ne
    """.split()
)


def _open(closed: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether it came closed or open."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def _flatten(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Atom], out: list[Equation]
) -> list[Atom]:
    """Append the equations of a jaxpr, applied to args, to `out`; returns its output atoms."""
    env: dict[Any, Atom] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def atom(v: Any) -> Atom:
        if not isinstance(v, core.Literal):
            return env[v]
        aval: Any = v.aval
        return np.asarray(v.val, aval.dtype)

    for eqn in jaxpr.eqns:
        start = len(out)
        results = _flatten_equation(eqn, [atom(v) for v in eqn.invars], out)
        # JAX's own jitted functions (jnp.sort, ...) know no line of the model, but their calls do.
        line = (eqn.source_info,)
        out[start:] = [dataclasses.replace(e, source=e.source + line) for e in out[start:]]
        env.update(zip(eqn.outvars, results, strict=True))
    return [atom(v) for v in jaxpr.outvars]


def _flatten_equation(eqn: Any, args: list[Atom], out: list[Equation]) -> list[Atom]:
    name = eqn.primitive.name
    if name in _IDENTITIES or (name == "convert_element_type" and _keeps_dtype(eqn)):
        return list(args)
    if name in ("jit", "pjit") and (whole := _whole(eqn, args)) is not None:
        out.append(whole)
        return list(whole.outputs)
    if name in _CALLS:
        return _flatten(*_open(eqn.params[_CALLS[name]]), args, out)
    if any("Debug" not in type(effect).__name__ for effect in eqn.effects):
        raise UnsupportedEquation(
            f"'{name}' has a side effect ({_where(eqn.source_info)}); a model must be a pure "
            "function of its input, without mutable references or callbacks"
        )
    unknown = [a for a in args if isinstance(a, Var)]
    if not unknown and (name in _EXACT or not _any_float(eqn.outvars)):
        return _fold(eqn, args)
    if name == "scan":
        return _unroll(eqn, args, out)
    if name == "cond":
        return _merge_branches(eqn, args, out)
    bounded = any(a.bounded for a in unknown)
    if name == "while" and bounded:
        raise DataDependent(
            f"a while loop runs over bounded values ({_where(eqn.source_info)}); "
            "use a fixed number of steps (lax.scan, lax.fori_loop with constant limits)"
        )
    outputs = [Var(tuple(v.aval.shape), v.aval.dtype, bounded) for v in eqn.outvars]
    if name in _BROADCASTING:
        args = [_spread(a, outputs[0].shape, out) for a in args]
    out.append(Equation(name, tuple(args), tuple(outputs), eqn.params, eqn.primitive))
    return list(outputs)


def _whole(eqn: Any, args: list[Atom]) -> Equation | None:
    """One equation for a call that is a block or parametrises weights (`blocks.py`)."""
    name = eqn.params["name"]
    bounded = [isinstance(a, Var) and a.bounded for a in args]
    if name == blocks.WEIGHTS:
        fits = not any(bounded)
    else:
        fits = name in blocks.REFERENCES and bounded[:1] == [True] and not any(bounded[1:])
    if not fits:
        return None
    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    inner = _inside(eqn.params["jaxpr"], specs, bounded)
    if name != blocks.WEIGHTS and not any(
        identical(inner, reference) for reference in _references(name, specs, bounded)
    ):
        return None
    outputs = [Var(tuple(v.aval.shape), v.aval.dtype, any(bounded)) for v in eqn.outvars]
    return Equation(name, tuple(args), tuple(outputs), {}, inner=inner)


def _references(name: str, specs: Sequence[Any], bounded: Sequence[bool]) -> Iterator[Graph]:
    """What a block's definition gives at these shapes, by itself and mapped over examples."""
    f = blocks.REFERENCES[name]
    for definition in (f, jax.vmap(f, (0,) + (None,) * (len(specs) - 1))):
        # It raises, with whatever JAX raises, where operands are not those of the block.
        with contextlib.suppress(Exception):
            yield _inside(jax.make_jaxpr(definition)(*specs), specs, bounded)


def _inside(closed: Any, specs: Sequence[Any], bounded: Sequence[bool]) -> Graph:
    """The graph of a program of its own."""
    inputs = tuple(
        Var(tuple(s.shape), s.dtype, flag) for s, flag in zip(specs, bounded, strict=True)
    )
    equations: list[Equation] = []
    outputs = _flatten(*_open(closed), inputs, equations)
    return prune(Graph(inputs, tuple(equations), tuple(outputs)))


def _spread(a: Atom, shape: tuple[int, ...], out: list[Equation]) -> Atom:
    """A bounded operand at the shape of the result: copying entries is a step of its own."""
    if not isinstance(a, Var) or not a.bounded or a.shape == shape:
        return a
    return _inline(lambda z: jnp.broadcast_to(z, shape), [a], out)[0]


def _keeps_dtype(eqn: Any) -> bool:
    return eqn.invars[0].aval.dtype == eqn.params["new_dtype"]


def _any_float(outvars: Sequence[Any]) -> bool:
    return any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in outvars)


def _names(jaxpr: Any) -> Iterator[str]:
    """The primitives of a program and of all programs inside of it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
    for inner in core.subjaxprs(jaxpr):
        yield from _names(inner)


def _fold(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of an equation on known arrays, concrete whenever the arrays are."""
    if is_traced(*args):
        return _bind(eqn.primitive, args, eqn.params)
    with jax.ensure_compile_time_eval():
        return _bind(eqn.primitive, args, eqn.params)


def _bind(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    # Lowered outside of a float64 block, numpy's float64 would be truncated; JAX's arrays are not.
    values = [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in values]
    results = primitive.bind(*values, **primitive.get_bind_params(params))
    return list(results) if primitive.multiple_results else [results]


def _inline(f: Callable[..., Any], args: Sequence[Atom], out: list[Equation]) -> list[Atom]:
    """Append the equations of a small function of ours applied to atoms."""
    specs = [
        jax.ShapeDtypeStruct(jnp.shape(a) if not isinstance(a, Var) else a.shape, a.dtype)
        for a in args
    ]
    return _flatten(*_open(jax.make_jaxpr(f)(*specs)), args, out)


def _unroll(eqn: Any, args: list[Atom], out: list[Equation]) -> list[Atom]:
    """A scan as `length` copies of its body.

    The parameters that count constants and carries differ between JAX versions, the ranks do not:
    scanned operands and stacked results have one axis more outside of the body than inside.
    """
    body, consts = _open(eqn.params["jaxpr"])
    scanned = sum(o.aval.ndim != i.aval.ndim for o, i in zip(eqn.invars, body.invars, strict=True))
    carried = sum(
        o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, body.outvars, strict=True)
    )
    first_scanned = len(args) - scanned
    fixed, carry = args[: first_scanned - carried], args[first_scanned - carried : first_scanned]
    steps = range(eqn.params["length"])
    stacked: dict[int, list[Atom]] = {}
    for t in reversed(steps) if eqn.params["reverse"] else steps:
        index = functools.partial(jax.lax.index_in_dim, index=t, axis=0, keepdims=False)
        rows = [_inline(index, [xs], out)[0] for xs in args[first_scanned:]]
        results = _flatten(body, consts, [*fixed, *carry, *rows], out)
        carry, stacked[t] = results[:carried], results[carried:]
    if not steps:
        empty = eqn.outvars[carried:]
        return [*carry, *(np.zeros(v.aval.shape, v.aval.dtype) for v in empty)]
    columns = zip(*(stacked[t] for t in steps), strict=True)
    return [*carry, *(_inline(lambda *ys: jnp.stack(ys), column, out)[0] for column in columns)]


def _merge_branches(eqn: Any, args: list[Atom], out: list[Equation]) -> list[Atom]:
    """A cond whose index does not depend on the input: the branch taken, or all and a selection."""
    index, operands = args[0], args[1:]
    if isinstance(index, Var):
        raise DataDependent(
            f"control flow depends on bounded values in `cond` ({_where(eqn.source_info)}); "
            "write it with jnp.where, which bounds both branches"
        )
    branches = eqn.params["branches"]
    if not is_traced(index):
        taken = int(np.clip(int(index), 0, len(branches) - 1))
        return _flatten(*_open(branches[taken]), operands, out)
    results = [_flatten(*_open(branch), operands, out) for branch in branches]
    which = jnp.clip(index, 0, len(branches) - 1).astype(jnp.int32)
    return [_inline(jax.lax.select_n, [which, *cases], out)[0]
            for cases in zip(*results, strict=True)]  # fmt: skip


def _where(*sources: Any) -> str:
    """The module path (Linen records one) and the innermost line outside of JAX and Flax."""
    stacks = [str(source.name_stack) for source in sources if str(source.name_stack)]
    place = [f"in {stacks[0]}"] if stacks else []
    for source in sources:
        for frame in getattr(source.traceback, "frames", ()):
            path = frame.file_name.replace("\\", "/")
            if not any(part in path for part in ("/jax/", "/flax/", HERE, "<frozen")):
                place.append(f"at {frame.file_name}:{frame.line_num} in {frame.function_name}")
                return ", ".join(place)
    return ", ".join(place) or "at an unknown place"
