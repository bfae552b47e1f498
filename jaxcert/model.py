"""Models as callers pass them: any `f: (b, *input) -> (b, k)`, seen as arrays plus structure.

A model that is a pytree (an NNX module, `jax.tree_util.Partial(apply, params)`, or a
`functools.partial` over arrays, which is treated alike) gives its arrays to jit as arguments, so a
second net of the same shapes triggers no trace. Any other callable is a constant of the trace.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array: TypeAlias = jax.Array
Model: TypeAlias = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a model but its arrays; hashable, so that jit can take it as a static argument."""

    treedef: Any
    constants: tuple[Any, ...]  # one per leaf, `_ARRAY` for arrays

    def build(self, arrays: Sequence[Any]) -> Model:
        """The model again, with these arrays in the places of its own."""
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in self.constants]
        return jax.tree.unflatten(self.treedef, leaves)


class _Array:
    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()


def split(f: Model) -> tuple[list[Any], Structure]:
    """A model as (arrays, structure), with `structure.build(arrays)` as the way back."""
    if isinstance(f, functools.partial) and not isinstance(f, jax.tree_util.Partial):
        f = jax.tree_util.Partial(f.func, *f.args, **f.keywords)
    if not callable(f):
        raise TypeError(f"the model must be callable on a batch, got {type(f).__name__}")
    leaves, treedef = jax.tree.flatten(f)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    constants = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    return arrays, Structure(treedef, constants)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def is_traced(*values: Any) -> bool:
    """Whether any leaf is a tracer, so that its value cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def as_float64(tree: Any) -> Any:
    """Every float array of a pytree in float64, which is exact. Only inside `enable_x64`."""

    def widen(leaf):
        if _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            return _float64(jnp.asarray(leaf))
        return leaf

    return jax.tree.map(widen, tree)


def _float64(x: Array) -> Array:
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


def output_shape(f: Model, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of f(x) without running it; anything but float (b, k) logits raises."""
    arrays, structure = split(f)  # rebuilt under the trace: a Flax module may touch its state
    out = jax.eval_shape(
        lambda a: structure.build(arrays)(a), jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)
    )
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
