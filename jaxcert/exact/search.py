"""Branch and bound on the device: a stack of sub-domains, and the step that works it off.

A step takes the k sub-domains on top of the stack, bounds them in one batch, drops what is proved,
and pushes the two halves of every other one, the most promising last. A point at which the model
breaks the property answers its question, whose other sub-domains are dropped as they come up. The
stack has a fixed capacity; a step that might not find room is not made, so nothing is ever lost.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import is_traced
from jaxcert.pytrees import pytree
from jaxcert.sets import Array


@pytree
@dataclasses.dataclass(frozen=True)
class Expansion:
    """What became of a batch of k sub-domains.

    Attributes:
      children: sub-domains that together hold all that is left of them, (2 k, ...).
      owner: the question of each child, int (2 k,).
      keep: which children there are, bool (2 k,).
      stuck: which of them cannot be split any further, bool (2 k,).
      order: children with the least come up first, (2 k,).
      points, point_owner: inputs that were tried, (p, *input) and (p,).
      broken: where the model breaks the property, bool (p,).
    """

    children: Any
    owner: Any
    keep: Array
    stuck: Array
    order: Array
    points: Array
    point_owner: Array
    broken: Array


Expand: TypeAlias = Callable[[Any, Array, Array], Expansion]
"""(k sub-domains, the question of each, which are there) -> their expansion."""


@pytree
@dataclasses.dataclass(frozen=True)
class Stack:
    """The state of a search for n questions.

    Attributes:
      domains: sub-domains, pytree of (capacity, ...); those below `count` are there.
      owner: the question of each, int (capacity,).
      count: how many there are.
      visited: how many were bounded.
      broken: questions with a counterexample, bool (n,).
      example: the counterexamples, (n, *input).
      leaves, leaf_owner, leaf_count: sub-domains that can not be split any further, likewise.
    """

    domains: Any
    owner: Any
    count: Any
    visited: Any
    broken: Any
    example: Any
    leaves: Any
    leaf_owner: Any
    leaf_count: Any

    @property
    def capacity(self) -> int:
        """How many sub-domains there is room for."""
        return len(self.owner)


def stack(domains: Any, example: Any, capacity: int, leaves: int) -> Stack:
    """One sub-domain for each of n questions.

    Args:
      domains: pytree of (n, ...).
      example: zeros (n, *input), in the type of counterexamples.
      capacity: at least n.
      leaves: how many of these there is room for.
    """
    n = len(example)
    # Where there are values, in numpy: small programs would be compiled in each process.
    lib: Any = jnp if is_traced(domains) else np

    def roomy(a: Any) -> Any:
        return lib.concatenate([a, np.zeros((capacity - n, *a.shape[1:]), a.dtype)])

    def empty(a: Any) -> np.ndarray:
        return np.zeros((leaves, *a.shape[1:]), a.dtype)

    owner, zero = np.arange(n, dtype=np.int32), np.int32(0)
    return Stack(
        jax.tree.map(roomy, domains), roomy(owner), np.int32(n), zero,
        np.zeros(n, bool), example, jax.tree.map(empty, domains), empty(owner), zero,
    )  # fmt: skip


def step(expand: Expand, k: int, state: Stack) -> Stack:
    """Work off the k sub-domains on top."""
    start = jnp.maximum(state.count - k, 0)
    place = start + jnp.arange(k, dtype=jnp.int32)
    top, owner = jax.tree.map(lambda a: a[place], (state.domains, state.owner))
    there = (place < state.count) & ~state.broken[owner]
    found = expand(top, owner, there)

    broken, example = _with_examples(state, found)
    keep = found.keep & ~broken[found.owner]
    leaf = keep & found.stuck
    keep &= ~leaf
    order = jnp.argsort(jnp.where(keep, -found.order, -jnp.inf))
    children, owners, keep = jax.tree.map(lambda a: a[order], (found.children, found.owner, keep))
    domains, owner, count = _pushed((state.domains, state.owner), start, (children, owners), keep)
    leaves, leaf_owner, leaf_count = _pushed(
        (state.leaves, state.leaf_owner), state.leaf_count, (found.children, found.owner), leaf
    )
    visited = state.visited + jnp.sum(there, dtype=jnp.int32)
    return Stack(domains, owner, count, visited, broken, example, leaves, leaf_owner, leaf_count)


def _pushed(old: Any, count: Array, new: Any, keep: Array) -> tuple[Any, Array, Array]:
    """Some of the new sub-domains behind the first `count` of the old, and how many there are."""
    position = count + jnp.cumsum(keep.astype(jnp.int32), dtype=jnp.int32) - 1
    position = jnp.where(keep, position, jnp.iinfo(jnp.int32).max)
    domains, owner = jax.tree.map(lambda a, b: a.at[position].set(b, mode="drop"), old, new)
    return domains, owner, count + jnp.sum(keep, dtype=jnp.int32)


def _with_examples(state: Stack, found: Expansion) -> tuple[Array, Array]:
    """Which questions are answered now, and by which points."""
    n, p = len(state.broken), len(found.points)
    fresh = found.broken & ~state.broken[found.point_owner]
    last = jnp.full(n, -1, jnp.int32)
    last = last.at[found.point_owner].max(jnp.where(fresh, jnp.arange(p, dtype=jnp.int32), -1))
    new = (last >= 0).reshape(n, *(1,) * (state.example.ndim - 1))
    example = jnp.where(new, found.points[jnp.maximum(last, 0)], state.example)
    return state.broken | (last >= 0), example


def has_room(state: Stack, k: int) -> Array:
    """Whether a step cannot overflow: it puts at most 2 k sub-domains in the place of k."""
    leaves = state.leaf_count + 2 * k <= len(state.leaf_owner)
    return (state.count + k <= state.capacity) & leaves


def block(expand: Expand, k: int, state: Stack, steps: Any) -> Stack:
    """Up to `steps` steps, fewer if the stack runs empty or there might be no room for what comes;
    pure, for use in jit."""

    def goes_on(carry):
        done, state = carry
        room = has_room(state, k)
        return (done < steps) & (state.count > 0) & room

    def body(carry):
        done, state = carry
        return done + 1, step(expand, k, state)

    start = jnp.zeros((), jnp.int32), state
    return jax.lax.while_loop(goes_on, body, start)[1]
