"""alpha-CROWN: the free slopes of linear bounds, optimised.

Every convex combination of two lines below a function is a line below it as well. Which one is best
depends on the row of the spec and on all that comes after the function, so the weights are found by
gradient ascent on the bounds themselves, one for each row and entry (Xu et al., "Fast and complete:
enabling complete verification with rapid and massively parallel incomplete verifiers", ICLR 2021).
Every iterate is a bound; each row keeps its best, so more steps are never worse.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds.backward import Form, ancestors, unit_rows
from jaxcert.bounds.hidden import (
    least_decided,
    least_values,
    least_values_together,
    refined,
    replaced,
    rows_that_fit,
    with_dust,
)
from jaxcert.bounds.interpreter import operand
from jaxcert.bounds.linear import Goal, Hidden, bounder, crown, walking
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.relaxations import lines
from jaxcert.bounds.rounding import unit
from jaxcert.bounds.transform import Bound
from jaxcert.bounds.walk import BoundHidden, Walk, cast, meet, size_of
from jaxcert.graph import Equation, Var
from jaxcert.model import Model
from jaxcert.sets import Array, Box
from jaxcert.specs import Spec


@dataclasses.dataclass(frozen=True)
class _Options:
    bound: BoundHidden | None
    steps: int
    joint: int
    optimiser: Any
    chunk: int | None


def alpha_crown(
    f: Model,
    *,
    outward: bool = False,
    hidden: Hidden = crown,
    steps: int = 20,
    joint: int = 0,
    optimiser: Any = None,
    chunk: int | None = None,
    coefficients: Any = jnp.float64,
) -> Bound:
    """Linear bounds of f with optimised slopes; never looser than `crown` with the same hidden
    bounds.

    Args:
      f, outward, chunk, coefficients: as for `crown`.
      hidden: `crown` or `crown_ibp`, whose hidden bounds are used, or boxes from `hidden_bounds`.
      steps: of gradient ascent on the rows of the spec, lower and upper bounds in one pass.
      joint: of gradient ascent through all hidden bounds, before that, where `hidden` is `crown`;
        each costs some three times as much as `crown`. Two or three get most of what there is.
      optimiser: an optax transformation; Adam with learning rate 0.35 by default.

    Returns:
      A function `(region, spec=None) -> Box` as `crown` does; derivatives in reverse mode only.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> f = lambda x: jnp.maximum(x, 0) - 0.4 * x
      >>> ball = LinfBall(0.2 * jnp.ones((1, 1)), 1.0)
      >>> print(f"{crown(f)(ball).lower[0, 0]:.2f} {alpha_crown(f)(ball).lower[0, 0]:.2f}")
      -0.48 -0.01
    """
    import optax  # here, because it takes longer to load than all the rest

    if joint and hidden is not crown:
        raise ValueError("joint steps improve linear hidden bounds: they need hidden=crown")
    options = _Options(
        bounder(hidden, None, chunk), steps, joint, optimiser or optax.adam(0.35), chunk
    )
    return walking(f, outward, functools.partial(_bound, options=options), coefficients)


def _bound(walk: Walk, spec: Spec | None, *, options: _Options) -> Box:
    walk.net = dataclasses.replace(walk.net, reverse_only=True)
    walk.run(options.bound)
    goal = Goal(walk, spec)
    if options.joint:
        walk = _with_better_hidden_bounds(walk, goal, options)
    free = _behind(walk, walk.output, free_lines(walk))

    def values(weights: list[Array]) -> Array:
        planes = {**walk.planes, **_combined(free, weights)}
        return least_values(walk, walk.output, goal.form, planes)

    best = _best(
        values, _zeros(walk, free, (2 * len(goal.form.rows),)), options.optimiser, options.steps
    )
    half = len(best) // 2
    box = goal.shaped(with_dust(walk, Box(best[:half].T, -best[half:].T), walk.dust[:, None]))
    return box if spec is not None else meet(walk.boxes[walk.output], box)


def _with_better_hidden_bounds(walk: Walk, goal: Goal, options: _Options) -> Walk:
    """The walk with hidden bounds from slopes that are optimised for the rows of the goal.

    One weight for each hidden layer that is bounded and each function behind it, shared by the
    layer's rows.
    """
    free = free_lines(walk)
    behind = [list(_behind(walk, v, free)) for v in walk.refined]
    start = [[jnp.zeros(w.shape, walk.rows_dtype) for w in layer] for layer in behind]

    def values(weights: list[list[Array]]) -> tuple[Array, Any]:
        attempt, queue, boxes, known = walk.again(), iter(weights), [], {}

        def bound(attempt: Walk, v: Var) -> Box:
            free = _behind(attempt, v, free_lines(attempt, known))
            planes = {**attempt.planes, **_combined(free, next(queue))}
            boxes.append(meet(walk.boxes[v], refined(attempt, v, options.chunk, planes)))
            return boxes[-1]

        attempt.run(bound)
        found = least_values(attempt, attempt.output, goal.form, attempt.planes)
        return found, [(box.lower, -box.upper) for box in boxes]

    _, ends = _best(values, start, options.optimiser, options.joint)
    better = walk.again()
    queue = iter(ends)

    def bound(_, v: Var) -> Box:
        low, high = next(queue)
        return Box(low, -high)

    better.run(bound)
    return better


def tightened(
    walk: Walk, loose: Sequence[Var], count: int, steps: int, optimiser: Any
) -> list[Box]:
    """The boxes of a walk's hidden values, `walk.refined`, with slopes optimised for each of the
    `count` least decided entries of those that are loose.

    All hidden values are bounded in one backward pass, which makes for a short program, with planes
    from the walk's boxes: what is gained early in the model shows in later layers the next time. It
    works on a chunk of entries at a time, for the sake of memory.

    Args:
      walk: run to its end.
      count, steps: as above; of gradient ascent.
      optimiser: an optax transformation.
    """
    net, start = walk.net, [walk.boxes[v] for v in walk.refined]
    goals = {v: min(count, math.prod(net.outer_and_inner(v))) for v in loose}
    if not goals:
        return start
    most = max(goals.values())
    chunk = max(1, min(rows_that_fit(walk, v) for v in goals) // (4 * len(goals)))
    free = free_lines(walk)
    index = {v: least_decided(walk, v, n) for v, n in goals.items()}

    def part(i: Array, boxes: list[Box]) -> list[Box]:
        place = i * chunk + jnp.arange(chunk)
        here = {v: each[jnp.minimum(place, len(each) - 1)] for v, each in index.items()}
        better = _optimised(walk, free, here, optimiser, steps)
        return [
            meet(box, replaced(walk, v, here[v], better[v])) if v in goals else box
            for v, box in zip(walk.refined, boxes, strict=True)
        ]

    return jax.lax.fori_loop(0, -(-most // chunk), part, start)


def _optimised(
    walk: Walk, free: Mapping[Var, "Free"], index: Mapping[Var, Array], optimiser: Any, steps: int
) -> dict[Var, tuple[Array, Array]]:
    """Bounds (n, b) of some entries (n, b) of several variables, with slopes of their own."""
    forms = {v: unit_rows(walk.net, v, each, walk.rows_dtype) for v, each in index.items()}
    counts = _passed(walk, forms)
    free = {v: free[v] for v in counts if v in free}

    def values(weights: list[Array]) -> Array:
        planes = {**walk.planes, **_combined(free, weights)}
        return jnp.concatenate(least_values_together(walk, forms, planes))

    start = [jnp.zeros((counts[v], *v.shape), walk.rows_dtype) for v in free]
    best, found, place = _best(values, start, optimiser, steps), {}, 0
    for v, form in forms.items():
        half = form.count // 2
        low, high = best[place : place + half], -best[place + half : place + 2 * half]
        box = with_dust(walk, Box(low, high), walk.dust)
        found[v], place = (box.lower, box.upper), place + 2 * half
    return found


def _passed(walk: Walk, forms: Mapping[Var, Form]) -> dict[Var, int]:
    """The variables that rows pass through on their way back, and how many rows have been met."""
    found, count = {}, 0
    for v in ancestors(walk.net, walk.planes, *forms):
        count += forms[v].count if v in forms else 0
        found[v] = count
    return found


def _zeros(walk: Walk, free: Mapping[Var, "Free"], lead: tuple[int, ...]) -> list[Array]:
    """Nothing of the other lines: what `crown` itself does."""
    return [jnp.zeros((*lead, *v.shape), walk.rows_dtype) for v in free]


def _behind(walk: Walk, v: Var, free: Mapping[Var, "Free"]) -> dict[Var, "Free"]:
    """Those of the free lines that bounds of v pass through."""
    return {w: free[w] for w in ancestors(walk.net, walk.planes, v) if w in free}


def _combined(free: Mapping[Var, "Free"], weights: Sequence[Array]) -> dict[Var, Planes]:
    return {v: each.combined(w) for (v, each), w in zip(free.items(), weights, strict=True)}


# --- Ascent ---------------------------------------------------------------------------------------


def _best(values: Callable[[Any], Any], start: Any, optimiser: Any, steps: Any) -> Any:
    """The greatest values(weights), entry by entry, over all iterates.

    The ascent is on the sum of the first leaf of the values.
    """

    def loss(weights):
        found = values(weights)
        target = jax.tree.leaves(found)[0]
        return -jnp.sum(jnp.where(jnp.isfinite(target), target, 0)), found

    def step(carry, _):
        weights, state, best = carry
        slope, found = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimiser.update(slope, state, weights)
        weights = jax.tree.map(lambda w, d: jnp.clip(w + d, 0, 1), weights, updates)
        return (weights, state, jax.tree.map(jnp.fmax, best, found)), None

    if not jax.tree.leaves(start):
        return values(start)
    unknown = jax.tree.map(
        lambda v: jnp.full(v.shape, jnp.nan, v.dtype), jax.eval_shape(values, start)
    )
    carry = (start, optimiser.init(start), unknown)
    if isinstance(steps, int):  # which alone can be differentiated
        (weights, _, best), _ = jax.lax.scan(step, carry, None, length=steps)
    else:
        weights, _, best = jax.lax.fori_loop(0, steps, lambda t, c: step(c, None)[0], carry)
    return jax.tree.map(jnp.fmax, best, values(weights))


# --- The other lines ------------------------------------------------------------------------------
#
# Left of its kink a convex function with one kink is the line that it is at l, right of it the line
# that it is at u, and both lie below it everywhere; upside down for a concave one. Whichever was
# not taken is the other line. Any other function has the ends of its range.

_KINKED = frozenset(["relu", "leaky_relu", "abs", "max", "min"])


@dataclasses.dataclass(frozen=True)
class Free:
    """Two pairs of lines around one function."""

    first: Planes
    second: Planes
    blur: Array | float  # by how much a combination of them is rounded at most

    def combined(self, share: Array) -> Planes:
        """(1 - share) of the first and share of the second."""
        # 1 - share in a narrower type errs by more than `blur` counts.
        share = share.astype(jnp.result_type(share, self.first.lower))

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


def free_lines(walk: Walk, known: dict[Var, Free] | None = None) -> dict[Var, Free]:
    """Each function that has lines so far, with others beside them; `known` is filled up."""
    known = {} if known is None else known
    for v, given in walk.lines.items():
        if v in known:
            continue
        first = walk.planes[v]
        second = dataclasses.replace(given, **_other_lines(walk, v, walk.net.makers[v], given))
        blur = 0.0
        if walk.outward:
            second = walk.counted(v, second)
            (x,) = first.operands
            size = size_of(walk.boxes[x], walk.centres.get(x))
            blur = 16 * unit(walk.rows_dtype) * sum(_sizes(p, size) for p in (first, second))
        known[v] = Free(first, second, blur)
    return known


def _sizes(plane: Planes, size: Array) -> Array:
    assert plane.below is not None
    assert plane.above is not None
    slopes = jnp.abs(plane.lower) + jnp.abs(plane.upper)
    return slopes * size + jnp.abs(plane.below) + jnp.abs(plane.above)


def _other_lines(walk: Walk, v: Var, eqn: Equation, first: Planes) -> dict[str, Any]:
    assert first.below is not None
    assert first.above is not None
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
    # A function that is one line on its box, which may end at the kink, has no other.
    one = (first.lower == first.upper) & (first.below == first.above)
    slope, low, high = (
        jnp.where(one, a, b)
        for a, b in ((first.lower, slope), (first.below, low), (first.above, high))
    )
    return {
        "lower": jnp.where(convex, slope, first.lower),
        "below": jnp.where(convex, low, first.below),
        "upper": jnp.where(convex, first.upper, slope),
        "above": jnp.where(convex, first.above, high),
    }
