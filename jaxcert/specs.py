"""Specs: the property to prove about a model's outputs, as linear inequalities."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.pytrees import pytree
from jaxcert.sets import Box

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Spec:
    """The property `C f(x) + d > 0` for every row, strictly.

    Attributes:
      matrix: C, (s, k) for the whole batch or (b, s, k) with rows per example.
      offset: d, anything that broadcasts to (b, s).
    """

    matrix: Any
    offset: Any = 0.0


@pytree
@dataclasses.dataclass(frozen=True)
class AllOf:
    """The property that every part holds."""

    parts: tuple["Property", ...]


@pytree
@dataclasses.dataclass(frozen=True)
class AnyOf:
    """The property that at every point of the set at least one part holds."""

    parts: tuple["Property", ...]


Property: TypeAlias = Spec | AllOf | AnyOf


def margins(label: Any, k: int) -> Spec:
    """The spec that class `label` beats every other one: rows e_label - e_j, j != label.

    Args:
      label: int array (b,), concrete or traced. A label outside [0, k), `ABSTAIN` for one, gives
        rows of NaN, which nothing can prove.
      k: number of classes, at least 2.

    Returns:
      A `Spec` with matrix (b, k - 1, k) and offset 0.
    """
    if k < 2:
        raise ValueError(f"margins need at least 2 classes, got k={k}")
    label = jnp.asarray(label)
    if not jnp.issubdtype(label.dtype, jnp.integer) or label.ndim != 1:
        raise TypeError(f"label must be an integer array (b,), got {label.dtype}{label.shape}")
    row = jnp.arange(k - 1)
    other = row + (row >= label[:, None])
    dtype = jnp.result_type(float)
    matrix = jax.nn.one_hot(label, k, dtype=dtype)[:, None] - jax.nn.one_hot(other, k, dtype=dtype)
    known = (label >= 0) & (label < k)
    return Spec(jnp.where(known[:, None, None], matrix, jnp.nan), jnp.zeros((), dtype))


def apply(spec: Spec, outputs: Array) -> Array:
    """C y + d for outputs (b, k), giving (b, s), at full precision and without rounding terms."""
    pattern = "sk,bk->bs" if jnp.ndim(spec.matrix) == 2 else "bsk,bk->bs"
    product = jnp.einsum(pattern, spec.matrix, outputs, precision=jax.lax.Precision.HIGHEST)
    return product + spec.offset


def proved(prop: Property, bound: Callable[[Spec], Box]) -> Array:
    """Whether bounds prove a property, bool (b,).

    Args:
      prop: a `Spec` or and/or groups of them.
      bound: spec -> `Box` of shape (b, s), usually `partial(method(f), region)`.

    An `AnyOf` is proved when one part is proved on the whole set, which is sufficient, not
    necessary. NaN bounds prove nothing.
    """
    if isinstance(prop, Spec):
        return jnp.all(bound(prop).lower > 0, axis=-1)
    if not prop.parts:
        raise ValueError(f"an {type(prop).__name__} without parts states nothing")
    parts = jnp.stack([proved(part, bound) for part in prop.parts])
    return jnp.all(parts, axis=0) if isinstance(prop, AllOf) else jnp.any(parts, axis=0)
