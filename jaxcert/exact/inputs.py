"""Branching on the input: boxes of inputs, cut in two until each part is decided.

For models of few inputs. One step bounds a batch of boxes by linear functions below every row of
the question, and with them

- refutes boxes: one row of each clause is positive everywhere;
- contracts the others: where all rows of some clause are at most 0, each of the functions below
  them is, too, which cuts off parts of the box (interval constraint propagation on linear
  relaxations, known as "Clip-and-Verify" in alpha,beta-CROWN);
- halves what is left along the input that is to blame for most of the gap between the functions and
  the row;
- tries the model at a corner and at the centre of each box.

Cuts of the set are functions below themselves: they take part in refutation and contraction as
members of every clause, as do the sums of functions and multiples of cuts.

All bounds are proofs: float64 boxes and offsets, float32 coefficients about distances from a centre
(`bounds/residual.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import pull_back
from jaxcert.bounds.concretise import box_of
from jaxcert.bounds.concretise import least as least_over
from jaxcert.bounds.hidden import refined, with_dust
from jaxcert.bounds.linear import Goal, shifted
from jaxcert.bounds.slopes import Free, free_lines
from jaxcert.bounds.walk import Walk
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Cuts, Question
from jaxcert.exact.search import Expansion
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.graph import Var
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box, InputSet, LinfBall, bounding_box, flat_norm
from jaxcert.specs import Spec

ROUNDS = 2  # of contraction; more gain nothing


@pytree
@dataclasses.dataclass(frozen=True)
class Below:
    """Affine functions below rows on a box: matrix (x - centre) + offset <= row(x).

    Attributes:
      matrix: (b, r, m), over the m inputs that vary.
      offset: (b, r), with all other inputs accounted for.
      centre: (b, m).
      value: their least values over the whole set, which may be less than a box, (b, r).
    """

    matrix: Array
    offset: Array
    centre: Array
    value: Array


def least(below: Below, lower: Array, upper: Array) -> Array:
    """The functions' least values over boxes (b, c, m), one for each clause: (b, c, r)."""
    n = lower.shape[-1]
    low, high = lower - below.centre[:, None], upper - below.centre[:, None]
    middle, radius = low / 2 + high / 2, high / 2 - low / 2
    # Products err by u, sums by gamma_n, the ends and the middle by a few u of their sizes.
    size = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) + jnp.abs(below.centre)[:, None]
    radius = radius + rounding.gamma(4 * n + 64) * size
    matrix = below.matrix[:, None]
    total = jnp.sum(matrix * middle[:, :, None] - jnp.abs(matrix) * radius[:, :, None], -1)
    total = total + below.offset[:, None]
    return total - rounding.gamma(4) * jnp.abs(total)


def contracted(
    below: Below, lower: Array, upper: Array, clauses: Array, alive: Array
) -> tuple[Array, Array, Array]:
    """The smallest boxes found around the points that may break a clause.

    Where every row of a clause is at most 0, the function below it is: along input j it may rise
    by no more than its slack, minus its least value, above that value. So x_j is within
    slack / |a_j| of the end at which the function is least.

    Args:
      below: r functions.
      lower, upper: (b, m).
      clauses: which functions belong to rows of each clause, bool (b, c, r).
      alive: which clauses may be broken at all, bool (b, c).

    Returns:
      The hull of what is left for each clause, (b, m) twice, and which clauses may still be broken.
    """
    shape = (*clauses.shape[:2], lower.shape[-1])
    low, high = (jnp.broadcast_to(a[:, None], shape) for a in (lower, upper))
    matrix = below.matrix[:, None]
    slope = jnp.abs(matrix)
    steep = slope > 2.0**-60
    for _ in range(ROUNDS):
        value = least(below, low, high)
        alive &= ~jnp.any((value > 0) & clauses, -1)
        known = clauses & ~jnp.isnan(value)  # what is unknown cuts nothing off
        slack = jnp.where(known, jnp.maximum(-value, 0.0), jnp.inf)
        reach = slack[..., None] / jnp.where(steep, slope, 1.0)
        reach = jnp.where(steep, reach * (1 + 8 * rounding.UNIT) + rounding.TINY, jnp.inf)
        top = jnp.min(jnp.where(matrix > 0, low[:, :, None] + reach, jnp.inf), 2)
        bottom = jnp.max(jnp.where(matrix < 0, high[:, :, None] - reach, -jnp.inf), 2)
        ends = rounding.widen(Box(bottom, top), rounding.ARITHMETIC)
        new_low, new_high = jnp.maximum(low, ends.lower), jnp.minimum(high, ends.upper)
        alive &= ~jnp.any(new_low > new_high, -1)
        low = jnp.where(alive[..., None], new_low, low)
        high = jnp.where(alive[..., None], new_high, high)
    some = jnp.any(alive, 1)[:, None]
    left = jnp.min(jnp.where(alive[..., None], low, jnp.inf), 1)
    right = jnp.max(jnp.where(alive[..., None], high, -jnp.inf), 1)
    return jnp.where(some, left, lower), jnp.where(some, right, upper), alive


# --- Bounds on one batch of boxes -----------------------------------------------------------------


@pytree
@dataclasses.dataclass(frozen=True)
class Places:
    """The inputs that vary, as places in a flattened example."""

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    varying: Any

    def spread(self, base: Array, part: Array) -> Array:
        """Examples (b, *shape) from what does not vary (b, *shape) and what does (b, m)."""
        flat = base.reshape(len(base), -1).at[:, self.varying].set(part)
        return flat.reshape(base.shape)

    def pick(self, full: Any) -> Any:
        """What varies: (..., *shape) to (..., m)."""
        lead = full.shape[: full.ndim - len(self.shape)]
        return full.reshape(*lead, -1)[..., self.varying]


def row_bounds(walk: Walk, spec: Spec, places: Places) -> Below:
    """Functions below every row of the spec on each box, with each choice of slopes in turn."""
    walk.run(refined)
    form = dataclasses.replace(Goal(walk, spec).form, mirrored=False)
    out, centre = walk.output, walk.centres[walk.net.input]
    box = walk.boxes[walk.net.input]
    free = free_lines(walk)

    def one(shares: list[Array]) -> tuple[Array, Array, Array]:
        mixed = {v: free[v].combined(share) for v, share in zip(free, shares, strict=True)}
        matrix, offset = pull_back(walk.net, {**walk.planes, **mixed}, out, form)
        value = offset + least_over(walk.around, matrix, True)
        both = [walk.from_centre(out, form, v).T for v in (offset, value)]
        both = [with_dust(walk, Box(v, v), walk.dust[:, None]).lower for v in both]
        both = [shifted(walk, spec, Box(v, v)).lower for v in both]
        return matrix.astype(walk.dtype), *both

    # One after the other, not side by side: as in `hidden.py`, a loop spares repeated work.
    choices = _slope_choices(walk, free)
    found = jax.lax.map(one, choices) if choices else [part[None] for part in one([])]
    matrix, offset, value = found
    matrix = jnp.moveaxis(matrix, 2, 0).reshape(len(centre), -1, *places.shape)
    offset, value = (jnp.moveaxis(a, 1, 0).reshape(len(centre), -1) for a in (offset, value))
    varying = places.pick(matrix)
    fixed = matrix.reshape(*matrix.shape[:2], -1)
    fixed = fixed.at[..., places.varying].set(0.0)
    radius = jnp.maximum(box.upper - centre, centre - box.lower).reshape(len(centre), 1, -1)
    lost = rounding.inflate(jnp.sum(jnp.abs(fixed) * radius, -1), fixed.shape[-1])
    lost = lost * (1 + 8 * rounding.UNIT)
    low = rounding.widen(Box(offset - lost, offset - lost), rounding.ARITHMETIC).lower
    return Below(varying, low, places.pick(centre), value)


def _slope_choices(walk: Walk, free: Mapping[Var, Free]) -> list[Array]:
    """Shares of the second lines: crown's own slopes, those parallel to the line on the other side,
    the least and the greatest. Each is best for some rows, and all take part in refutation and
    contraction."""

    def parallel(each: Free) -> Array:
        gap = each.second.lower - each.first.lower
        share = (each.first.upper - each.first.lower) / jnp.where(gap == 0, 1.0, gap)
        return jnp.clip(jnp.where(gap == 0, 0.0, share), 0, 1)

    def choices(each: Free) -> Array:
        first, second = each.first.lower, each.second.lower
        shares = [jnp.zeros_like(first), parallel(each), second < first, second > first]
        return jnp.stack([share.astype(walk.rows_dtype) for share in shares])

    return [choices(each) for each in free.values()]


def cut_functions(cuts: Cuts, places: Places, box: Box) -> Below:
    """The cuts as functions below themselves on boxes (b, *shape)."""
    centre = box.lower / 2 + box.upper / 2
    radius = jnp.maximum(box.upper - centre, centre - box.lower).reshape(len(centre), 1, -1)
    matrix = jnp.asarray(cuts.matrix)
    fixed = jnp.abs(matrix).at[..., places.varying].set(0.0)
    lost = rounding.inflate(jnp.sum(fixed * radius, -1), fixed.shape[-1])
    low = cuts.at(centre).lower - lost * (1 + 8 * rounding.UNIT)
    offset = rounding.widen(Box(low, low), rounding.ARITHMETIC).lower
    varying = matrix[..., places.varying]
    return Below(varying, offset, places.pick(centre), jnp.full_like(offset, -jnp.inf))


def with_cuts(
    below: Below, clauses: Array, cuts: Below, lower: Array, upper: Array
) -> tuple[Below, Array]:
    """Functions below rows of clauses (b, c, r) on boxes (b, m) and, behind them, the cuts and sums
    of either and multiples of cuts; what is of cuts alone belongs to each clause that has rows."""
    b, p = cuts.offset.shape
    if p == 0:
        return below, clauses
    some = jnp.broadcast_to(jnp.any(clauses, -1, keepdims=True), (b, clauses.shape[1], p))
    clauses = jnp.concatenate([clauses, some], -1)
    both = _joined(below, cuts)
    return _joined(both, _held(both, cuts, lower, upper)), jnp.tile(clauses, 2)


def _joined(first: Below, second: Below) -> Below:
    """The functions of both."""
    parts = ((getattr(f, name) for f in (first, second)) for name in ("matrix", "offset", "value"))
    matrix, offset, value = (jnp.concatenate(tuple(part), 1) for part in parts)
    return Below(matrix, offset, first.centre, value)


def _held(below: Below, cuts: Below, lower: Array, upper: Array) -> Below:
    """Functions with multiples of the cuts added, which are at most 0 where it matters. One after
    another, each cut gets the multiplier m >= 0 for which the least value over the box is largest.

    That value is concave and piecewise linear in m, and rises by the value of the cut at the
    function's minimiser, which changes where a coefficient changes its sign. Whatever m is found,
    a + m a' errs by 2 u of both sizes.
    """
    low, high = ((end - below.centre)[:, None] for end in (lower, upper))
    reach = jnp.maximum(jnp.abs(low), jnp.abs(high)) * (1 + 4 * rounding.UNIT)
    n = lower.shape[1] + 8

    def add(found: tuple[Array, Array], cut: tuple[Array, Array]) -> tuple[tuple, None]:
        matrix, offset = found
        row, level = cut[0][:, None], cut[1][:, None]
        rising = (matrix > 0) | ((matrix == 0) & (row < 0))
        rate = jnp.sum(row * jnp.where(rising, low, high), 2) + level
        flips = jnp.where((matrix * row <= 0) & (row != 0), jnp.abs(matrix / row), jnp.inf)
        drops = jnp.broadcast_to(jnp.abs(row) * (high - low), flips.shape)
        flips, drops = jax.lax.sort((flips, drops), num_keys=1)
        past = jnp.cumsum(drops, 2) >= rate[..., None]
        m = jnp.min(jnp.where(past, flips, jnp.inf), 2)
        m = jnp.where((rate > 0) & (m < 2.0**60), m, 0.0)
        sizes = jnp.abs(matrix) + m[..., None] * jnp.abs(row)
        lost = jnp.sum((sizes + 2.0**-900) * reach, 2) + jnp.abs(offset) + m * jnp.abs(level)
        lost = rounding.inflate(rounding.gamma(8) * lost, n)
        new = offset + m * level - lost
        new = rounding.widen(Box(new, new), rounding.ARITHMETIC).lower
        better = m > 0
        matrix = jnp.where(better[..., None], matrix + m[..., None] * row, matrix)
        return (matrix, jnp.where(better, new, offset)), None

    turns = jnp.moveaxis(cuts.matrix, 1, 0), jnp.moveaxis(cuts.offset, 1, 0)
    (matrix, offset), _ = jax.lax.scan(add, (below.matrix, below.offset), turns)
    return Below(matrix, offset, below.centre, jnp.full_like(offset, -jnp.inf))


def cut_boxes(question: Question, dtype: Any) -> tuple[Box, Array]:
    """What the cuts leave of the sets' boxes, between numbers of the inputs' type where the boxes
    are, and which sets are seen to be empty, (n,)."""
    box = bounding_box(question.region)
    n, *shape = box.lower.shape
    places = Places(tuple(shape), tuple(range(math.prod(shape))))
    low, high, alive = box.lower.reshape(n, -1), box.upper.reshape(n, -1), jnp.ones((n, 1), bool)
    below = cut_functions(question.cuts, places, box)
    below = _joined(below, _held(below, below, low, high))
    every = jnp.ones((n, 1, below.offset.shape[1]), bool)
    for _ in range(4):
        low, high, alive = contracted(below, low, high, every, alive)
    low = rounded_down(low.reshape(box.lower.shape), dtype).astype(low.dtype)
    high = rounded_up(high.reshape(box.lower.shape), dtype).astype(high.dtype)
    return Box(jnp.maximum(low, box.lower), jnp.minimum(high, box.upper)), ~alive[:, 0]


# --- Which input to split -------------------------------------------------------------------------
#
# The gap between a row and the function below it comes from the nonlinear functions: each adds its
# coefficient times the gap between its two lines. A function's gap is shared among the inputs in
# proportion to how far each of them moves its operand.


def blame(walk: Walk, spec: Spec, row: Array, places: Places) -> Array:
    """How much of the gap of one row (b,) of the spec comes from each varying input, (b, m)."""
    net = walk.net
    hardest = Spec(
        jnp.take_along_axis(spec.matrix, row[:, None, None], 1),
        jnp.take_along_axis(spec.offset, row[:, None], 1),
    )
    met: dict[Var, Array] = {}
    form = dataclasses.replace(Goal(walk, hardest).form, mirrored=False)

    def meet(v: Var, rows: Array) -> tuple[Array, Array]:
        met[v] = rows
        return rows, jnp.zeros(())

    stops = {v: functools.partial(meet, v) for v in walk.lines}
    pull_back(net, walk.planes, walk.output, form, stops)
    moved = _movements(walk, places)
    total = jnp.zeros((net.batch, len(places.varying)))
    for v, plane in walk.lines.items():
        if v not in met:
            continue
        (x,) = plane.operands
        box = walk.boxes[x]
        middle = box.lower / 2 + box.upper / 2
        assert plane.above is not None
        assert plane.below is not None
        gap = (plane.upper - plane.lower) * middle + (plane.above - plane.below)
        gap = jnp.abs(met[v][0]) * jnp.maximum(jnp.where(jnp.isfinite(gap), gap, 0), 0)
        share = moved[x] / jnp.maximum(jnp.sum(moved[x], 0), 2.0**-60)
        total = total + net.per_example(gap * share, x).T
    return total


def _movements(walk: Walk, places: Places) -> dict[Var, Array]:
    """How far each varying input moves each variable, (m, *v), along the middle of its planes."""
    net = walk.net
    box = walk.boxes[net.input]
    unit = jnp.zeros((len(places.varying), *places.shape)).reshape(len(places.varying), -1)
    unit = unit.at[jnp.arange(len(places.varying)), places.varying].set(1.0)
    unit = unit.reshape(len(places.varying), 1, *places.shape)
    found = {net.input: (unit * (box.upper - box.lower)).astype(walk.rows_dtype)}
    for v, plane in walk.planes.items():
        xs = [found[x] for x in plane.operands]
        if not xs:
            found[v] = jnp.zeros((len(places.varying), *v.shape), walk.rows_dtype)
            continue
        mean = jax.tree.map(lambda a, b: a / 2 + b / 2, plane.lower, plane.upper)
        found[v] = jax.vmap(functools.partial(plane.apply, mean))(*xs)
    return {v: jnp.abs(moved) for v, moved in found.items()}


# --- One step -------------------------------------------------------------------------------------


@pytree
@dataclasses.dataclass(frozen=True)
class Boxes:
    """Sub-domains: what the varying inputs range over, (b, m) each, in float64."""

    lower: Array
    upper: Array


def expansion(
    model: Traceable, places: Places, arrays: Any, question: Question, boxes: Boxes, owner: Array,
    there: Array,
) -> Expansion:  # fmt: skip
    """Bound, refute, contract and halve a batch of boxes. Only inside `enable_x64`."""
    mine = jax.tree.map(lambda a: a[owner], question)
    region = _part(mine.region, places, boxes)
    graph, rows = model.trace(arrays, len(owner))
    walk = Walk(graph, rows, region, True, jnp.float32)
    below = row_bounds(walk, mine.rows, places)
    count = mine.matrix.shape[1]
    clauses = jnp.tile(mine.clauses, (1, 1, below.offset.shape[1] // count))

    open_ = jnp.any(clauses, -1)
    cuts = cut_functions(mine.cuts, places, box_of(region, True))
    below, clauses = with_cuts(below, clauses, cuts, boxes.lower, boxes.upper)
    open_ &= ~jnp.any((below.value[:, None] > 0) & clauses, -1)
    open_ &= _meets(mine.region, region)[:, None]
    low, high, alive = contracted(below, boxes.lower, boxes.upper, clauses, open_)
    keep = there & jnp.any(alive, 1)
    row, functions = _hardest(below, mine.clauses, alive, low, high)
    scores = blame(walk, mine.rows, row, places)
    scores = scores + 1e-6 * jnp.abs(functions) * (boxes.upper - boxes.lower)
    scores = _with_borders(scores, cuts, low, high)
    wide = (high - low) > 2.0**-40 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    left = (high - low) / jnp.where(boxes.upper > boxes.lower, boxes.upper - boxes.lower, 1.0)
    scores = jnp.where(jnp.isfinite(scores), scores, 0.0)
    scores = jnp.where(wide, scores * left + 2.0**-200, -1.0)

    points = [jnp.where(functions > 0, low, high), low / 2 + high / 2]
    points = [places.spread(bounding_box(mine.region).lower, p) for p in points]
    points, broken, value = model.tried(
        arrays, question, jnp.concatenate(points), jnp.tile(owner, 2)
    )
    worth = jnp.min(value.reshape(2, -1), 0)
    split = scores == jnp.max(scores, 1, keepdims=True)
    split &= jnp.cumsum(split, 1) == 1
    middle = low / 2 + high / 2
    children = Boxes(
        jnp.concatenate([low, jnp.where(split, middle, low)]),
        jnp.concatenate([jnp.where(split, middle, high), high]),
    )
    return Expansion(
        children, jnp.tile(owner, 2), jnp.tile(keep, 2), jnp.tile(~jnp.any(wide, 1), 2),
        jnp.tile(worth, 2), points, jnp.tile(owner, 2),
        broken & jnp.tile(there, 2),
    )  # fmt: skip


def _with_borders(scores: Array, cuts: Below, lower: Array, upper: Array) -> Array:
    """Scores of inputs with a share for those along which cuts go through the boxes: up to half of
    what the others have, as far as there are any."""
    if cuts.offset.shape[1] == 0:
        return scores
    moves = jnp.abs(cuts.matrix) * (upper - lower)[:, None]
    whole = jnp.sum(moves, 2, keepdims=True)
    middle = (lower / 2 + upper / 2 - cuts.centre)[:, None]
    value = jnp.sum(cuts.matrix * middle, 2) + cuts.offset
    through = (jnp.abs(value) < whole[..., 0] / 2)[..., None]
    share = jnp.max(jnp.where(through, moves / jnp.where(whole > 0, whole, 1.0), 0.0), 1)
    top = jnp.max(jnp.where(jnp.isfinite(scores), scores, 0.0), 1, keepdims=True)
    return scores + (top / 2 + 2.0**-100) * share


def _part(region: InputSet, places: Places, boxes: Boxes) -> InputSet:
    """The part of each set inside of its box."""
    whole = box_of(region, True)
    part = Box(places.spread(whole.lower, boxes.lower), places.spread(whole.upper, boxes.upper))
    return part if isinstance(region, Box) else dataclasses.replace(region, valid=part)


def _meets(whole: InputSet, part: InputSet) -> Array:
    """Whether a ball reaches into its box at all, (b,)."""
    if isinstance(part, Box | LinfBall) or not isinstance(part.valid, Box):
        return jnp.ones(bounding_box(whole).lower.shape[0], bool)
    nearest = jnp.clip(part.x, part.valid.lower, part.valid.upper)
    return ~(flat_norm(nearest - part.x, part.norm) > part.eps * (1 + 2.0**-30))


def _hardest(
    below: Below, clauses: Array, alive: Array, lower: Array, upper: Array
) -> tuple[Array, Array]:
    """The row (b,) that comes closest to proving the clause that is furthest from being proved, and
    the function below it, (b, m)."""
    count = clauses.shape[2]
    boxes = (jnp.broadcast_to(a[:, None], (*a.shape[:1], 1, a.shape[1])) for a in (lower, upper))
    value = least(below, *boxes)[:, 0, :count]
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    best = jnp.max(jnp.where(clauses, value[:, None], -jnp.inf), 2)
    worst = first(jnp.where(alive, -best, -jnp.inf))
    mine = jnp.take_along_axis(clauses, worst[:, None, None], 1)[:, 0]
    row = first(jnp.where(mine, value, -jnp.inf))
    return row, jnp.take_along_axis(below.matrix, row[:, None, None], 1)[:, 0]


def first(values: Array) -> Array:
    """The place of the first largest along the last axis; by no argmax, as in certificate.py."""
    top = jnp.max(values, -1, keepdims=True)
    place = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(values == top, place, values.shape[-1] - 1), -1)
