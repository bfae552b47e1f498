"""Exact search as part of a caller's own program: of fixed size, without the host."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.concretise import box_of
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact import inputs, search
from jaxcert.exact.model import posed
from jaxcert.floats import ieee_float64
from jaxcert.model import Model
from jaxcert.sets import Array, InputSet, Polytope
from jaxcert.specs import Property


def decide_within(
    f: Model,
    region: InputSet,
    prop: Property,
    *,
    steps: int,
    batch: int = 32,
    capacity: int = 4096,
) -> Verdict:
    """Decide for each set whether the property holds on all of it, inside of `jax.jit`.

    A pure function of the arrays of model, region and property: branch and bound on the inputs, as
    `verify` does it for few of them, in one loop on the device. There is no attack beforehand, and
    nothing spills to the host.

    Args:
      f: the model, (b, *input) -> (b, k), rows independent.
      region: a `Box`, `LinfBall`, `L2Ball` or `L1Ball` of b sets.
      prop: a `Spec`, or `AllOf` and `AnyOf` of them, with `>` strict.
      steps: how many batches of boxes are bounded and halved at most.
      batch: boxes of a step; static.
      capacity: boxes that there is room for, at least b + `batch`; static.

    Returns:
      A `Verdict`, which means what that of `verify` does. UNKNOWN for DOMAINS after so many steps,
      for MEMORY if there is no room for more boxes, and for NUMERICS where boxes became too small
      to halve or numbers are NaN, as those of a traced set that is invalid.

    Raises:
      ValueError, TypeError: wrong shapes, dtypes or values; a `Polytope`.
      UnsupportedEquation, MixedRows: the model cannot be bounded.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x - 0.25) + jnp.abs(x + 0.25)
      >>> @jax.jit
      ... def status(x, offset):
      ...     spec = Spec(jnp.ones((1, 1)), offset[:, None])
      ...     return decide_within(f, LinfBall(x, 1.0), spec, steps=100).status
      >>> print(status(jnp.zeros((2, 1)), jnp.array([-0.4, -0.6])))
      [1 2]
    """
    if isinstance(region, Polytope):
        raise TypeError("linear inequalities are looked at on the host: use exact.verify")
    model, arrays, asked = posed(f, region, prop)
    with jax.enable_x64(True):
        arrays, asked = ieee_float64((arrays, jax.tree.map(jnp.asarray, asked)))
        places = inputs.Places(model.shape, np.arange(math.prod(model.shape)))
        expand = functools.partial(inputs.expansion, model, places, arrays, asked)
        state = search.block(expand, batch, _start(asked.region, batch, capacity), steps)
        status, reason = _answers(state, batch)
        return Verdict(status, reason, state.example.astype(model.dtype))


def _start(region: Any, batch: int, capacity: int) -> search.Stack:
    """A stack with one box around each set."""
    box = box_of(region, True)
    n = len(box.lower)
    if capacity < n + batch:
        raise ValueError(f"capacity must be at least b + batch = {n + batch}, got {capacity}")
    start = inputs.Boxes(box.lower.reshape(n, -1), box.upper.reshape(n, -1))
    state = search.stack(start, np.zeros(box.lower.shape), capacity, 4 * batch)
    return jax.tree.map(jnp.asarray, state)


def _answers(state: search.Stack, batch: int) -> tuple[Array, Array]:
    """Status and reason of each question."""

    def some(owner: Array, count: Array) -> Array:
        there = jnp.arange(len(owner), dtype=jnp.int32) < count
        return jnp.zeros(len(state.broken), bool).at[owner].max(there)

    waiting = some(state.owner, state.count)
    stuck = some(state.leaf_owner, state.leaf_count)
    ended = jnp.where(search.has_room(state, batch), Reason.DOMAINS, Reason.MEMORY)
    reason = jnp.where(waiting, ended, jnp.where(stuck, Reason.NUMERICS, Reason.NONE))
    status = jnp.where(waiting | stuck, Status.UNKNOWN, Status.VERIFIED)
    status = jnp.where(state.broken, Status.FALSIFIED, status)
    reason = jnp.where(state.broken, Reason.NONE, reason)
    return status.astype(jnp.int32), reason.astype(jnp.int32)
