"""Models as callers pass them: any `f: (b, *input) -> (b, k)`, seen as arrays plus structure.

A model that is a pytree (an NNX module, `jax.tree_util.Partial(apply, params)`, or a
`functools.partial` over arrays, which is treated alike) gives its arrays to jit as arguments, so a
second net of the same shapes compiles nothing. Any other callable is a constant of the compiled
program. Wherever a function of the caller's is part of a model, a program is used again only if
the model still traces to the same equations on the same constants: an object whose weights were
replaced, or a new lambda around a new net, compiles anew.
"""

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcert.errors import StatefulModel

Array: TypeAlias = jax.Array
Model: TypeAlias = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a model but its arrays; hashable, so that jit can take it as a static argument."""

    treedef: Any
    classes: int  # the treedef's hash, as treedefs of two dataclasses may be equal: see pytrees
    constants: tuple["_Constant | None", ...]  # one per leaf, None for arrays
    program: Any = None  # what the model computes, if it hides state that the rest does not show

    def build(self, arrays: Sequence[Any]) -> Model:
        """The model again, with these arrays in the places of its own."""
        remaining = iter(arrays)
        leaves = [next(remaining) if c is None else c.value for c in self.constants]
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """A leaf that is no array. Equal to another if the key is: True is not 1, 0.0 is not -0.0."""

    value: Any
    key: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def split(f: Model, x: Any = None) -> tuple[list[Any], Structure]:
    """A model as (arrays, structure), with `structure.build(arrays)` as the way back.

    Args:
      f: the model.
      x: an input, wherever the structure serves as a key for compiled programs.
    """
    if isinstance(f, functools.partial) and not isinstance(f, jax.tree_util.Partial):
        f = jax.tree_util.Partial(f.func, *f.args, **f.keywords)
    if not callable(f):
        raise TypeError(f"the model must be callable on a batch, got {type(f).__name__}")
    if _is_linen(f) and getattr(f, "scope", None) is None:
        raise TypeError(
            f"{type(f).__name__} is a Linen module without its weights; pass "
            "functools.partial(module.apply, variables)"
        )
    leaves, treedef = jax.tree.flatten(f)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    constants = tuple(None if _is_array(leaf) else _Constant(leaf, _key(leaf)) for leaf in leaves)
    structure = Structure(treedef, hash(treedef), constants)
    parts = [*_functions(f), *(c.value for c in constants if c is not None)]
    opaque = jax.tree_util.treedef_is_leaf(treedef) or any(_hides_state(part) for part in parts)
    if x is not None and opaque:
        structure = dataclasses.replace(structure, program=_fingerprint(structure, arrays, x))
    return arrays, structure


_STATELESS = (
    bool, int, float, complex, str, bytes, type(None), type, np.dtype,
    types.ModuleType, types.BuiltinFunctionType,
)  # fmt: skip


def _key(leaf: Any) -> Any:
    if isinstance(leaf, bool | int | float | complex | str | bytes | None):
        return type(leaf), repr(leaf)
    return id(leaf)


def _functions(f: Any) -> list[Any]:
    """The functions that a pytree holds in its structure: of partials, and as static attributes."""
    found = []

    def visit(node: Any) -> bool:
        if isinstance(node, jax.tree_util.Partial):
            found.append(node.func)
        held = getattr(node, "__dict__", {}).values()
        found.extend(v for v in held if callable(v) and jax.tree_util.all_leaves([v]))
        return False

    jax.tree.leaves(f, is_leaf=visit)
    return found


def _hides_state(value: Any) -> bool:
    """Whether numbers may lie behind a value, where its identity does not tell when they change.

    So they may behind every function that is not of a library: in what it closes over, in globals,
    in attributes of modules and classes, and all that again in the functions it calls. (Methods of
    a module's class are taken for its code, as jit does.)
    """
    if isinstance(value, _STATELESS):
        return False
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif inspect.ismethod(value):
        inside = [value.__self__]
    elif hasattr(value, "__wrapped__"):  # jit and the like
        inside = [value.__wrapped__]
    elif inspect.isfunction(value):
        return (value.__module__ or "").split(".")[0] not in ("jax", "flax", "optax")
    elif _is_linen(value) and getattr(value, "scope", None) is None:  # holds no arrays itself
        inside = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        return True
    return any(_hides_state(each) for each in inside)


def _is_linen(value: Any) -> bool:
    return any(kind.__module__.startswith("flax.linen") for kind in type(value).__mro__)


def _fingerprint(structure: Structure, arrays: list[Any], x: Any) -> Any:
    """What a model computes on inputs like x: a digest of its program and of its constants."""
    closed = _program(structure, arrays, x)
    constants = list(_constants_of(closed))
    if is_traced(constants):
        return object()  # weights of a surrounding trace: equal to nothing else
    digest = hashlib.sha256(str(closed).encode())
    with jax.ensure_compile_time_eval():
        for constant in constants:
            digest.update(_bytes(constant))
    return digest.digest()


def digest(f: Model, x: Any) -> str:
    """A name for what f computes on inputs like x: of its program, weights and constants.

    The same in every process that runs the same version of JAX.
    """
    arrays, structure = split(f)
    closed = _program(structure, arrays, x)
    program = re.sub("0x[0-9a-f]+", "", str(closed))  # functions are printed with their address
    found = hashlib.sha256(program.encode())
    with jax.ensure_compile_time_eval():
        for array in [*arrays, *_constants_of(closed)]:
            found.update(_bytes(array))
    return found.hexdigest()[:16]


def _program(structure: Structure, arrays: list[Any], x: Any) -> Any:
    """The model's equations on inputs like x."""
    specs = jax.eval_shape(lambda arrays: arrays, arrays)
    try:
        return jax.make_jaxpr(lambda arrays, z: structure.build(arrays)(z))(specs, _spec(x))
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # Flax's, which may not be imported here
            raise
        raise StatefulModel(
            "a module that the model closes over changes its own state at each call; call its "
            "eval(), and pass the module itself instead of a function around it"
        ) from error


def _constants_of(program: Any) -> Iterator[Any]:
    """The constants of a program and of all programs inside of it."""
    yield from getattr(program, "consts", ())
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield from (v.val for v in eqn.invars if hasattr(v, "val"))
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _constants_of(inner)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input, as JAX's current mode has it."""
    return jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.canonicalize_dtype(x.dtype))


def _bytes(constant: Any) -> bytes:
    dtype = getattr(constant, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant).tobytes()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def uses_float64() -> bool:
    """Whether the caller computes in float64 by default (JAX's x64 mode)."""
    return jnp.dtype(jnp.result_type(float)) == jnp.float64


def is_traced(*values: Any) -> bool:
    """Whether any leaf is a tracer, so that its value cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def as_float64(tree: Any) -> Any:
    """Every float array of a pytree in float64, which is exact. Only inside `enable_x64`."""

    def widen(leaf):
        if not (_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        return _traced_float64(leaf) if is_traced(leaf) else _concrete_float64(leaf)

    return jax.tree.map(widen, tree)


def _concrete_float64(x: Any) -> Array:
    """x in float64, where it is; by NumPy, as operations outside of jit are compiled one by one."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        wide = np.asarray(x).astype(np.float64)
    committed = isinstance(x, jax.Array) and x.committed
    return jax.device_put(wide, x.sharding) if committed else jnp.asarray(wide)


def _traced_float64(x: Array) -> Array:
    """x in float64, subnormal numbers included, which XLA's cast flushes to zero on CPU."""
    wide = x.astype(jnp.float64)
    info = jnp.finfo(x.dtype)
    if info.bits >= 64:
        return wide
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{info.bits}"))
    mantissa = bits & (2**info.nmant - 1)
    size = mantissa.astype(jnp.float64) * 2.0 ** (info.minexp - info.nmant)
    subnormal = (mantissa != 0) & (((bits >> info.nmant) & (2**info.nexp - 1)) == 0)
    return jnp.where(subnormal, jnp.where(jnp.signbit(x), -size, size), wide)


@functools.partial(jax.jit, static_argnums=0)
def run(structure: Structure, arrays: list[Any], x: Array) -> Any:
    """The model at x."""
    return structure.build(arrays)(x)


def output_shape(structure: Structure, arrays: list[Any], x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a model's output at x without running it, traced once per structure and
    shapes; anything but float (b, k) logits raises.
    """
    out = run.eval_shape(structure, arrays, _spec(x))
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"the model must return one array of logits (b, k), got {type(out).__name__}"
        )
    if out.ndim != 2 or out.shape[0] != jnp.shape(x)[0]:
        raise ValueError(
            f"the model must map {jnp.shape(x)} to logits ({jnp.shape(x)[0]}, k), got {out.shape}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"the model must return floating point logits, got {out.dtype}")
    return out
