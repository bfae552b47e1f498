"""alpha-CROWN: the free slopes of linear bounds, optimised.

Every convex combination of two lines below a function is a line below it as well. Which one is best
depends on the row of the spec and on all that comes after the function, so the weights are found by
gradient ascent on the bounds themselves, one for each row and entry (Xu et al., "Fast and complete:
enabling complete verification with rapid and massively parallel incomplete verifiers", ICLR 2021).
Every iterate is a bound; each row keeps its best, so more steps are never worse.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcert.bounds.backward import ancestors, pull_back
from jaxcert.bounds.concretise import least
from jaxcert.bounds.hidden import refined, with_dust
from jaxcert.bounds.interpreter import operand
from jaxcert.bounds.linear import Goal, crown, refines
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.relaxations import LINES, lines
from jaxcert.bounds.rounding import UNIT
from jaxcert.bounds.transform import Bound, Method, transform
from jaxcert.bounds.walk import Walk, cast, meet
from jaxcert.graph import Equation, Graph, Var
from jaxcert.model import Model
from jaxcert.rows import Rows
from jaxcert.sets import Array, Box, InputSet
from jaxcert.specs import Spec


@dataclasses.dataclass(frozen=True)
class _Options:
    refine: bool
    steps: int
    joint: int
    optimiser: optax.GradientTransformation
    chunk: int | None


def alpha_crown(
    f: Model,
    *,
    outward: bool = False,
    hidden: Method = crown,
    steps: int = 20,
    joint: int = 0,
    optimiser: optax.GradientTransformation | None = None,
    chunk: int | None = None,
) -> Bound:
    """Linear bounds of f with optimised slopes; never looser than those of `hidden`.

    Args:
      f, outward, chunk: as for `crown`.
      hidden: `crown` or `crown_ibp`, whose hidden bounds are used.
      steps: of gradient ascent on the rows of the spec, lower and upper bounds in one pass.
      joint: of gradient ascent on all hidden bounds together, before that; each costs some three
        times as much as `crown`.
      optimiser: an optax transformation; Adam with learning rate 0.25 by default.

    Returns:
      A function `(region, spec=None) -> Box` as `crown` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> f = lambda x: jnp.maximum(x, 0) - 0.4 * x
      >>> ball = LinfBall(0.2 * jnp.ones((1, 1)), 1.0)
      >>> print(crown(f)(ball).lower, alpha_crown(f)(ball).lower.round(3))
      [[-0.48]] [[0.]]
    """
    options = _Options(refines(hidden), steps, joint, optimiser or optax.adam(0.25), chunk)
    return transform(f, outward, functools.partial(_bound, options=options))


def _bound(
    graph: Graph,
    rows: Mapping[Var, Rows],
    region: InputSet,
    spec: Spec | None,
    outward: bool,
    *,
    options: _Options,
) -> Box:
    walk = Walk(graph, rows, region, outward)
    bound = functools.partial(refined, chunk=options.chunk) if options.refine else None
    walk.run(bound)
    goal = Goal(walk, spec)
    free = _behind(walk, walk.output, _free_lines(walk))
    start = [jnp.zeros((2 * len(goal.form.rows), *v.shape), walk.dtype) for v in free]

    def values(weights: list[Array]) -> Array:
        planes = {**walk.planes, **_combined(free, weights)}
        matrix, offset = pull_back(walk.net, planes, walk.output, goal.form)
        return least(walk.region, matrix, walk.outward) + offset

    best = _best(values, start, options.optimiser, options.steps)
    half = len(best) // 2
    box = goal.shaped(with_dust(walk, Box(best[:half].T, -best[half:].T)))
    return box if spec is not None else meet(walk.boxes[walk.output], box)


def _behind(walk: Walk, v: Var, free: Mapping[Var, "_Free"]) -> dict[Var, "_Free"]:
    """Those of the free lines that bounds of v pass through."""
    return {w: free[w] for w in ancestors(walk.net, walk.planes, v) if w in free}


def _combined(free: Mapping[Var, "_Free"], weights: Sequence[Array]) -> dict[Var, Planes]:
    return {v: each.combined(w) for (v, each), w in zip(free.items(), weights, strict=True)}


# --- Ascent ---------------------------------------------------------------------------------------


def _best(
    values: Callable[[Any], Any], start: Any, optimiser: optax.GradientTransformation, steps: int
) -> Any:
    """The best of values(weights), leaf by leaf and entry by entry, over all iterates."""

    def loss(weights):
        found = values(weights)
        return -sum(
            jnp.sum(jnp.where(jnp.isfinite(v), v, 0)) for v in jax.tree.leaves(found)
        ), found

    def step(carry, _):
        weights, state, best = carry
        slope, found = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimiser.update(slope, state, weights)
        weights = jax.tree.map(lambda w, d: jnp.clip(w + d, 0, 1), weights, updates)
        return (weights, state, jax.tree.map(jnp.fmax, best, found)), None

    if not jax.tree.leaves(start) or steps == 0:
        return values(start)
    shapes = jax.eval_shape(values, start)
    least_of_all = jax.tree.map(lambda v: jnp.full(v.shape, jnp.nan, v.dtype), shapes)
    carry = (start, optimiser.init(start), least_of_all)
    (weights, _, best), _ = jax.lax.scan(step, carry, None, length=steps)
    return jax.tree.map(jnp.fmax, best, values(weights))


# --- The other lines ------------------------------------------------------------------------------
#
# Left of its kink a convex function with one kink is the line that it is at l, right of it the line
# that it is at u, and both lie below it everywhere; upside down for a concave one. Whichever of them
# was not taken is the other line. Any other function has the ends of its range.

_KINKED = frozenset(["relu", "leaky_relu", "abs", "max", "min"])


@dataclasses.dataclass(frozen=True)
class _Free:
    """Two pairs of lines around one function."""

    first: Planes
    second: Planes
    blur: Array | float  # by how much a combination of them is rounded at most

    def combined(self, share: Array) -> Planes:
        """(1 - share) of the first and share of the second."""

        def mix(p, q):
            return (1 - share) * p + share * q

        a, b = self.first, self.second
        return dataclasses.replace(
            a,
            lower=mix(a.lower, b.lower),
            upper=mix(a.upper, b.upper),
            below=mix(a.below, b.below) - self.blur,
            above=mix(a.above, b.above) + self.blur,
        )


def _free_lines(walk: Walk) -> dict[Var, _Free]:
    """Each function that has lines, with others beside them."""
    found = {}
    for v, first in walk.planes.items():
        eqn = walk.net.makers[v]
        if eqn.name not in LINES:
            continue
        second = dataclasses.replace(first, **_other_lines(walk, v, eqn, first))
        blur = 0.0
        if walk.outward:
            second = walk.counted(eqn, second)
            (x,) = (walk.boxes[operand] for operand in first.operands)
            size = jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper))
            sides = [(p.lower, p.below) for p in (first, second)]
            sides += [(p.upper, p.above) for p in (first, second)]
            blur = 16 * UNIT * sum(jnp.abs(w) * size + jnp.abs(t) for w, t in sides)
        found[v] = _Free(first, second, blur)
    return found


def _other_lines(walk: Walk, v: Var, eqn: Equation, first: Planes) -> dict[str, Array]:
    box = walk.boxes[v]
    zero = jnp.zeros_like(box.lower)
    flat = {"lower": zero, "below": box.lower, "upper": zero, "above": box.upper}
    if eqn.name not in _KINKED:
        return flat
    values = [cast(operand(walk.boxes, a, walk.outward), walk.dtype) for a in eqn.inputs]
    (place,) = (i for i, a in enumerate(eqn.inputs) if isinstance(a, Var) and a.bounded)

    def at(end):
        return lines(eqn, [Box(end, end) if i == place else a for i, a in enumerate(values)],
                     walk.outward)  # fmt: skip

    left, right = at(values[place].lower), at(values[place].upper)
    convex = left.lower_slope <= right.lower_slope
    took_left = jnp.where(convex, first.lower, first.upper) == left.lower_slope
    slope = jnp.where(took_left, right.lower_slope, left.lower_slope)
    low = jnp.where(took_left, right.lower_offset, left.lower_offset)
    high = jnp.where(took_left, right.upper_offset, left.upper_offset)
    return {
        "lower": jnp.where(convex, slope, first.lower),
        "below": jnp.where(convex, low, first.below),
        "upper": jnp.where(convex, first.upper, slope),
        "above": jnp.where(convex, first.above, high),
    }
