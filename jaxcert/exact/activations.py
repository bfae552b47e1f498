"""Branching on hidden values: the range of one operand of a nonlinear function, cut in two.

For models of many inputs. A sub-domain is a set of inputs that put some hidden values into given
ranges, for one row of the question. With l <= z <= u known of a hidden value z, and a multiplier m,

    row >= row + m z - max(m, 0) u - min(m, 0) l,

so that the linear bound is pulled back with m added to the coefficients of z (beta-CROWN, Wang et
al., NeurIPS 2021). Multipliers and slopes of all sub-domains of a batch are improved together by
gradient ascent, from where their parents' left off; every iterate is a bound, rounding counted. So
are multipliers m >= 0 of the set's cuts: row >= row + m (a x + b), as a x + b <= 0.

What is split next is found by looking at the gap that each function leaves, and among the few with
the largest by bounding the halves (De Palma et al., "Improved branch and bound for neural network
verification via Lagrangian decomposition", 2021).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.attacks import gradient
from jaxcert.bounds import rounding
from jaxcert.bounds.backward import ancestors, pull_back
from jaxcert.bounds.concretise import least
from jaxcert.bounds.hidden import refined, with_dust
from jaxcert.bounds.interpreter import lower, operand
from jaxcert.bounds.linear import Goal, shifted
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.relaxations import value_at
from jaxcert.bounds.slopes import Free, free_lines, tightened
from jaxcert.bounds.walk import Walk, cast, size_of
from jaxcert.exact.model import Traceable
from jaxcert.exact.outline import Outline, outline, require_alike
from jaxcert.exact.question import Question
from jaxcert.exact.search import Expansion
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.graph import Var
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box, InputSet, per_example
from jaxcert.specs import Spec


@pytree
@dataclasses.dataclass(frozen=True)
class Multipliers:
    """What a bound is improved by, for k sub-domains.

    Attributes:
      share: of the second lines around the nonlinear functions, (k, m) one function after another.
      hidden: of the ranges of the hidden values, (k, n).
      rows: weights of the clause's rows, (k, s).
      cuts: of the set's cuts, (k, p), at least 0.
    """

    share: Array
    hidden: Array
    rows: Array
    cuts: Array


@pytree
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Which hidden values of k sub-domains to cut, the most promising first.

    Attributes:
      place: which of the n hidden values, int (k, c); negative where there is nothing to cut.
      cut: where, (k, c).
      unit: the largest coefficient on each hidden variable, (k, v).
    """

    place: Array
    cut: Array
    unit: Array


@pytree
@dataclasses.dataclass(frozen=True)
class Domains:
    """k sub-domains.

    Attributes:
      lower, upper: ranges of the n hidden values that are bounded, (k, n) in float32.
      side: which ends are cuts, int8 (k, n): 1 the lower, 2 the upper, 3 both.
      multipliers: with which `bound` was found.
      bound: below the clause's rows, weighted, (k,).
      next: what may be split next.
      layout: which hidden values these are; static.
    """

    lower: Array
    upper: Array
    side: Array
    multipliers: Multipliers
    bound: Array
    next: Candidates
    layout: "Layout" = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Options:
    """How hard a search by hidden values tries.

    Attributes:
      steps: of ascent for each new sub-domain.
      rate: of their learning.
      candidates: for the next split, whose halves are bounded.
    """

    steps: int = 12
    rate: float = 0.05
    candidates: int = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which hidden values there are: of which graph, and of which variables how many."""

    outline: Outline
    sizes: tuple[int, ...]


def layout(walk: Walk) -> Layout:
    """The hidden variables that a walk has bounded."""
    sizes = tuple(_size(walk, v) for v in walk.refined)
    return Layout(outline(walk.net.graph, walk.net.batch), sizes)


def _require_same(known: Layout, own: Layout) -> None:
    """Ranges are found for one batch size and used for another: they must be of the same values."""
    require_alike(known.outline, own.outline)
    if known.sizes != own.sizes:  # not an assert, which may be switched off
        raise AssertionError("one graph has its hidden values in one order")


def _size(walk: Walk, v: Var) -> int:
    return math.prod(walk.net.outer_and_inner(v))


def box_at(lower: Array, upper: Array, walk: Walk, v: Var) -> Box:
    """The box of the next hidden value v of a walk, whose ranges (k, n) are given."""
    start = sum(_size(walk, w) for w in walk.refined)
    part = slice(start, start + _size(walk, v))
    ends = lower[:, part], upper[:, part]
    return Box(*[walk.net.shaped(end.astype(walk.dtype), v) for end in ends])


class Pass:
    """Bounds of a batch of sub-domains, as a function of multipliers.

    Attributes:
      walk: with the sub-domains' ranges.
      lines: pairs of lines around the nonlinear functions.
      hidden: the bounded hidden values.
    """

    def __init__(
        self, model: Traceable, arrays: Any, question: Question, domains: Domains,
        coefficients: Any = jnp.float32, goal: Array | None = None,
    ):  # fmt: skip
        """With a `goal` (k, n), which has one coefficient at most for each sub-domain, that hidden
        value times its coefficient is bounded; the question's rows must be zeros then."""
        count = len(domains.bound)
        graph, rows = model.trace(arrays, count)
        self.question, self.domains = question, domains
        self.walk = Walk(graph, rows, question.region, True, coefficients)
        self.walk.run(functools.partial(box_at, domains.lower, domains.upper), every=True)
        _require_same(domains.layout, layout(self.walk))
        self.lines: dict[Var, Free] = free_lines(self.walk)
        self.hidden = list(self.walk.refined)
        self._sides = self.by_variable(domains.side, self.hidden)
        self._goals = {} if goal is None else self.by_variable(goal, self.hidden)
        met = ancestors(self.walk.net, self.walk.planes, self.walk.output)
        missed = [self.walk.net.flat(g, v) for v, g in self._goals.items() if v not in met]
        self._missed = jnp.any(jnp.concatenate([domains.lower[:, :0], *missed], 1) != 0, 1)

    def by_variable(self, values: Array, variables: Iterable[Var]) -> dict[Var, Array]:
        """Values (k, n) of several variables, each in its own shape."""
        found, start = {}, 0
        for v in variables:
            size = _size(self.walk, v)
            found[v] = self.walk.net.shaped(values[:, start : start + size], v)
            start += size
        return found

    def spread(self, values: Array) -> Array:
        """One number per hidden variable (k, v) at each of its values, (k, n)."""
        parts = [
            jnp.broadcast_to(values[:, i : i + 1], (len(values), _size(self.walk, v)))
            for i, v in enumerate(self.hidden)
        ]
        return jnp.concatenate([values[:, :0], *parts], 1)

    def spec(self, weights: Array) -> Spec:
        """The clause's rows, weighted, as one row; rounding comes off its offset, unless it is one
        of the rows as it stands."""
        mine = self.question.clauses[:, 0]  # others may be rows of other clauses
        weights = jnp.where(mine, weights, 0.0)
        wide = weights.astype(self.walk.dtype)[..., None]
        matrix = jnp.sum(wide * self.question.matrix, 1)
        offset = jnp.sum(wide[..., 0] * self.question.offset, 1)
        box, s = self.walk.boxes[self.walk.output], weights.shape[1]
        size = jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))
        sizes = jnp.sum(wide * jnp.abs(self.question.matrix), 1)
        error = jnp.sum(jnp.where(sizes > 0, sizes * size, 0.0), 1)
        error = error + jnp.sum(wide[..., 0] * jnp.abs(self.question.offset), 1)
        one = (jnp.sum(weights != 0, 1) == 1) & jnp.all((weights == 0) | (weights == 1), 1)
        error = rounding.inflate(rounding.gamma(s + 8) * error, s + size.shape[1])
        return Spec(matrix[:, None], (offset - jnp.where(one, 0.0, error))[:, None])

    def bound(
        self, given: Multipliers, seen: dict[Var, Array] | None = None
    ) -> tuple[Array, Array]:
        """Lower bounds (k,) of the weighted rows, and the coefficients (k, *input) on the input."""
        walk = self.walk
        spec = self.spec(given.rows)
        form = dataclasses.replace(Goal(walk, spec).form, mirrored=False)
        matrix, offset = pull_back(
            walk.net, self.planes(given), walk.output, form, self._stops(given, seen)
        )
        matrix, offset = self._with_cuts(given, matrix, offset)
        values = least(walk.around, matrix, walk.outward) + offset
        low = walk.from_centre(walk.output, form, values).T
        low = with_dust(walk, Box(low, low), walk.dust[:, None]).lower
        found = shifted(walk, spec, Box(low, low)).lower[:, 0]
        return jnp.where(self._missed, -jnp.inf, found), matrix[0]

    def _with_cuts(self, given: Multipliers, matrix: Array, offset: Array) -> tuple[Array, Array]:
        """The row, coefficients (1, k, *input) and offsets (1, k), with multipliers of the cuts
        added: in terms of the distance from the centre c, if there is one, m a (x - c) + m (a c +
        b). The sum of coefficients errs by a unit of its size, each time |x - c|.
        """
        walk, cuts = self.walk, self.question.cuts
        if not cuts.count:
            return matrix, offset
        box, centre = walk.boxes[walk.net.input], walk.centres.get(walk.net.input)
        m = jnp.maximum(given.cuts, 0.0).astype(walk.dtype)
        added, sizes = (
            jnp.sum(m[..., None] * a, 1).reshape(matrix.shape)
            for a in (cuts.matrix, jnp.abs(cuts.matrix))
        )
        total = (matrix.astype(walk.dtype) + added).astype(walk.rows_dtype)
        level = cuts.at(jnp.zeros_like(box.lower) if centre is None else centre).lower
        held, count = jnp.sum(m * level, 1), rounding.gamma(cuts.count + 8)
        lost = 2 * rounding.unit(walk.rows_dtype) * jnp.abs(total.astype(walk.dtype))
        lost = (lost + count * sizes + 2.0**-120) * size_of(box, centre)
        lost = jnp.sum(lost, tuple(range(2, lost.ndim)))
        # The row's own offset is added to, and the least value of a row to both.
        lost = lost + count * (jnp.sum(m * jnp.abs(level), 1) + jnp.abs(offset))
        lost = lost + rounding.gamma(8) * jnp.abs(least(walk.around, total, walk.outward))
        return total, offset + held - jax.lax.stop_gradient(
            rounding.inflate(2 * lost, jnp.size(total))
        )

    def planes(self, given: Multipliers) -> Mapping[Var, Planes]:
        """All planes, those of nonlinear functions mixed of their lines."""
        shares = self.by_variable(given.share, self.lines)
        mixed = {v: each.combined(shares[v]) for v, each in self.lines.items()}
        return {**self.walk.planes, **mixed}

    def _stops(self, given: Multipliers, seen: dict[Var, Array] | None) -> dict[Var, Any]:
        multipliers = self.by_variable(given.hidden, self.hidden)
        stops = {v: functools.partial(self._held, v, m) for v, m in multipliers.items()}

        def see(v: Var, rows: Array) -> tuple[Array, Array]:
            assert seen is not None
            seen[v] = rows[0]
            return stops[v](rows) if v in stops else (rows, jnp.zeros(()))

        if seen is None:
            return stops
        return {v: functools.partial(see, v) for v in {*stops, *self.lines}}

    def _held(self, v: Var, m: Array, rows: Array) -> tuple[Array, Array]:
        """The rows with multipliers for the range of v added, and what the range's ends add.

        In terms of distances from the centre c, if there is one: m (z - c) - m (u - c). The sum of
        coefficients errs by half a unit of its size, each time |z - c|; the products by a few units
        of float64.
        """
        walk = self.walk
        box, centre = walk.boxes[v], walk.centres.get(v, jnp.zeros(()))
        goal = self._goals.get(v, jnp.zeros_like(m))
        aimed = rows + goal
        total = aimed + m
        # Where m is 0 the end decides about the derivative alone: the cut one is what m is for.
        side = self._sides[v]
        end = jnp.where((m > 0) | ((m == 0) & (side != 1)), box.upper, box.lower)
        end = jnp.where(jnp.isfinite(end) | (m != 0), end, centre)
        wide = m.astype(walk.dtype)
        held = -wide * (end - centre)
        n = jnp.size(m) + len(walk.net.graph.equations) + 16  # all that offsets are added up with
        unit = rounding.unit(walk.rows_dtype)
        sizes = jnp.abs(total) + jnp.where(goal == 0, 0.0, jnp.abs(aimed))
        lost = (sizes * unit + 2.0**-120) * size_of(box, walk.centres.get(v))
        lost = lost + rounding.gamma(n) * jnp.abs(wide) * (jnp.abs(end) + jnp.abs(centre))
        lost = jnp.where((m == 0) & (goal == 0), 0.0, 2 * lost)
        moved = goal.astype(walk.dtype) * centre
        lost = lost + 2 * rounding.gamma(n) * jnp.abs(moved)
        return total, walk.net.per_example(held + moved - rounding.inflate(lost, n), v)


# --- Ascent ---------------------------------------------------------------------------------------


def improved(
    some: Pass, start: Multipliers, units: Array, steps: Any, rate: float
) -> tuple[Multipliers, Array, Array]:
    """The best multipliers met on some steps of Adam from `start`, itself included, their bounds
    (k,), and the coefficients (k, *input) there.

    Args:
      units: of the multipliers of hidden values, (k, v): sizes of the coefficients there.
    """
    import optax  # here, because it takes longer to load than all the rest

    optimiser = optax.adam(optax.exponential_decay(rate, 1, 0.97))
    units = some.spread(units)
    of_cuts = _unit_of_cuts(some, start)

    def actual(p: Multipliers) -> Multipliers:
        return dataclasses.replace(p, hidden=p.hidden * units, cuts=p.cuts * of_cuts)

    def loss(p: Any) -> tuple[Array, Any]:
        found, slope = some.bound(actual(p))
        return -jnp.sum(jnp.where(jnp.isfinite(found), found, 0.0)), (found, slope)

    def step(_, carry):
        p, state, (values, kept) = carry
        ascent, (found, slope) = jax.grad(loss, has_aux=True)(p)
        better = found > values
        kept = jax.tree.map(
            lambda old, new: jnp.where(per_example(better, new), new, old), kept, (p, slope)
        )
        values = jnp.where(better, found, values)
        updates, state = optimiser.update(ascent, state)
        p = _allowed(jax.tree.map(jnp.add, p, updates), some.domains.side)
        return p, state, (values, kept)

    p = dataclasses.replace(start, hidden=start.hidden / units, cuts=start.cuts / of_cuts)
    worst = jnp.full(len(some.domains.bound), -jnp.inf, some.walk.dtype)
    slope = jnp.zeros(some.walk.net.input.shape, some.walk.rows_dtype)
    carry = p, optimiser.init(p), (worst, (p, slope))  # type: ignore[arg-type]
    values, (kept, slope) = jax.lax.fori_loop(0, steps + 1, step, carry)[2]
    return actual(kept), values, slope


def _unit_of_cuts(some: Pass, start: Multipliers) -> Array:
    """Of the multipliers of the set's cuts, (k, 1): the largest coefficient on the input, as the
    cuts' own are about 1, or the largest multiplier so far."""
    if not some.question.cuts.count:
        return jnp.ones((len(some.domains.bound), 1), jnp.float32)
    _, slope = some.bound(start)
    size = jnp.max(jnp.abs(slope), tuple(range(1, slope.ndim)))[:, None]
    size = jnp.maximum(size, jnp.max(start.cuts, 1, keepdims=True)).astype(jnp.float32)
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1.0)


def _allowed(p: Multipliers, side: Array) -> Multipliers:
    """Shares between 0 and 1, multipliers only where hidden values are cut and at least 0 for cuts
    of the set, weights that add up to 1."""
    hidden = jnp.where(side > 0, p.hidden, 0.0)
    rows = jnp.maximum(p.rows, 0.0)
    total = jnp.sum(rows, 1, keepdims=True)
    rows = rows / jnp.where(total > 0, total, 1.0)
    return Multipliers(jnp.clip(p.share, 0, 1), hidden, rows, jnp.maximum(p.cuts, 0.0))


# --- What to split --------------------------------------------------------------------------------


def candidates(some: Pass, given: Multipliers, count: int) -> Candidates:
    """What to split next: where functions leave the largest gaps at these multipliers."""
    gain, cut, unit = gaps(some, given)
    best, place = jax.lax.top_k(gain, min(count, gain.shape[1]))
    place = jnp.where(best > 0, place.astype(jnp.int32), -1)
    return Candidates(place, jnp.take_along_axis(cut, jnp.maximum(place, 0), 1), unit)


def gaps(some: Pass, given: Multipliers) -> tuple[Array, Array, Array]:
    """How much of the gap between a row and its bound is due to the functions of each hidden value,
    (k, n), negative where cutting it would not help; where it would be cut, (k, n); and the largest
    coefficient on each hidden variable, (k, v)."""
    walk, net = some.walk, some.walk.net
    seen: dict[Var, Array] = {}
    some.bound(given, seen)
    planes = some.planes(given)
    gains = {v: jnp.zeros(v.shape, walk.dtype) for v in some.hidden}
    cuts = {v: walk.boxes[v].lower / 2 + walk.boxes[v].upper / 2 for v in some.hidden}
    for y in walk.lines:
        (x,) = planes[y].operands
        if x not in gains or y not in seen:
            continue
        cut = _cut(walk, y, x)
        gap = _gap(walk, y, planes[y], cut)
        weight = jnp.where(seen[y] < 0, gap.upper, gap.lower)
        gains[x] = gains[x] + jnp.abs(seen[y]) * jnp.where(jnp.isfinite(weight), weight, 0.0)
        cuts[x] = cut
    none = jnp.zeros((net.batch, 0), jnp.float32)
    gain, cut, unit = [none.astype(walk.dtype)], [none], [none]
    for v in some.hidden:
        box, c = walk.boxes[v], cuts[v].astype(jnp.float32)
        inside = (box.lower < c) & (c < box.upper)
        gain.append(net.flat(jnp.where(inside, gains[v] + 2.0**-100, -1.0), v))
        cut.append(net.flat(c, v))
        rows = net.flat(jnp.abs(seen[v]), v) if v in seen else none
        size = jnp.max(rows, 1, initial=0.0, keepdims=True)
        size = jnp.where((size > 0) & jnp.isfinite(size), size, 1.0)
        unit.append(size.astype(jnp.float32))
    found = [jnp.concatenate(parts, 1) for parts in (gain, cut, unit)]
    return found[0], found[1], found[2]


def _cut(walk: Walk, y: Var, x: Var) -> Array:
    """Where to cut the operand x of a function y: at its kink, else in the middle."""
    eqn, box = walk.net.makers[y], walk.boxes[x]
    if eqn.name in ("relu", "leaky_relu", "abs"):
        return jnp.zeros_like(box.lower)
    if eqn.name in ("max", "min"):
        (other,) = (a for a in eqn.inputs if a is not x)
        constant = lower(operand(walk.boxes, other, True)).astype(walk.dtype)
        return jnp.broadcast_to(constant, x.shape)
    return box.lower / 2 + box.upper / 2


def _gap(walk: Walk, y: Var, plane: Planes, cut: Array) -> Box:
    """How far the lower and the upper plane are from the function: at the cut, and below it at that
    end where it is nearer."""
    (x,) = plane.operands
    box, eqn = walk.boxes[x], walk.net.makers[y]
    centre, middle = walk.centres[x], walk.centres[y]

    values = [cast(operand(walk.boxes, a, True), walk.dtype) for a in eqn.inputs]

    def at(point: Array) -> tuple[Array, Array]:
        f = value_at(eqn, values, False, point).lower
        low = plane.lower * (point - centre) + plane.below + middle
        high = plane.upper * (point - centre) + plane.above + middle
        return f - low, high - f

    low, high = at(cut)
    ends = jnp.minimum(at(box.lower)[0], at(box.upper)[0])
    return Box(jnp.maximum(jnp.maximum(low, ends), 0.0), jnp.maximum(high, 0.0))


# --- One step -------------------------------------------------------------------------------------


def expansion(
    model: Traceable, options: Options, arrays: Any, question: Question, domains: Domains,
    owner: Array, there: Array,
) -> Expansion:  # fmt: skip
    """Split a batch of sub-domains and bound the halves. Only inside `enable_x64`."""
    owners = jnp.tile(owner, 2)
    both = jax.tree.map(lambda a: a[owners], question)
    whole = domains.next.place[:, 0] < 0  # then the first half is all of it, the second not there
    children, slope = split(functools.partial(Pass, model, arrays, both), options, domains)
    keep = jnp.concatenate([there, there & ~whole]) & ~(children.bound > 0)
    stuck = children.next.place[:, 0] < 0
    points = _tries(model, arrays, both, slope)
    points, broken, _ = model.tried(arrays, question, points, owners)
    broken &= jnp.tile(there, 2)
    return Expansion(children, owners, keep, stuck, children.bound, points, owners, broken)


def split(passes: Any, options: Options, domains: Domains) -> tuple[Domains, Array]:
    """The halves (2 k) of k sub-domains, and the coefficients on the input (2 k, *input).

    Each candidate in turn is split and its halves are bounded before any ascent, then the best one
    of each sub-domain with ascent. All of that in one loop, since its body takes long to compile.
    """
    count = domains.next.place.shape[1]
    index = jnp.arange(len(domains.bound))

    def tried(i: Array, carry: Any) -> Any:
        worth, choice, _ = carry
        final = i == count
        now = jnp.where(final, choice, i)
        place, cut = domains.next.place[index, now], domains.next.cut[index, now]
        halves = _halves(domains, place, cut)
        some = passes(halves)
        units = jnp.tile(domains.next.unit, (2, 1))
        steps = jnp.where(final, options.steps, 0)
        multipliers, bound, slope = improved(some, halves.multipliers, units, steps, options.rate)
        following = jax.lax.cond(
            final,
            lambda: candidates(some, multipliers, options.candidates),
            lambda: jax.tree.map(lambda a: jnp.concatenate([a, a]), domains.next),
        )
        bound = jnp.fmax(bound, halves.bound)
        halves = dataclasses.replace(halves, multipliers=multipliers, bound=bound, next=following)
        mine = jnp.where(place < 0, -jnp.inf, _worth(bound))
        better = mine > worth
        return jnp.where(better, mine, worth), jnp.where(better, i, choice), (halves, slope)

    def nothing(struct: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(struct.shape, struct.dtype)

    worth = jnp.full(len(index), -jnp.inf)
    choice = jnp.zeros(len(index), jnp.int32)
    zeros = jax.eval_shape(lambda: tried(jnp.int32(0), (worth, choice, None))[2])
    start = worth, choice, jax.tree.map(nothing, zeros)
    return jax.lax.fori_loop(0, count + 1, tried, start)[2]


def _worth(bounds: Array) -> Array:
    """How good a split is by the bounds (2 k,) of its halves, (k,): the worse one counts, then the
    other one; what is proved is as good as can be."""
    low, high = jnp.minimum(jnp.where(jnp.isnan(bounds), -jnp.inf, bounds), 0.0).reshape(2, -1)
    return jnp.minimum(low, high) + 0.1 * jnp.maximum(low, high)


def _halves(domains: Domains, place: Array, cut: Array) -> Domains:
    """The sub-domains in which one hidden value is below its cut, then those in which it is above;
    all of a sub-domain in both where it is so anyway, or where the place is negative."""
    cut = cut[:, None]
    here = jnp.arange(domains.lower.shape[1]) == place[:, None]
    here &= (domains.lower < cut) & (cut < domains.upper)
    below = dataclasses.replace(
        domains,
        upper=jnp.where(here, cut, domains.upper),
        side=jnp.where(here, domains.side | jnp.int8(2), domains.side),
    )
    above = dataclasses.replace(
        domains,
        lower=jnp.where(here, cut, domains.lower),
        side=jnp.where(here, domains.side | jnp.int8(1), domains.side),
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, above)


def _tries(model: Traceable, arrays: Any, question: Question, slope: Array) -> Array:
    """A point of each set where the linear bound is least, pushed on by a few steps of descent."""
    region = question.whole
    start = gradient.corner(region, slope.astype(jnp.float64))
    objective = model.objective(arrays, question)
    return gradient.descend(objective, region, start, steps=3, size=0.15)[0]


# --- The beginning --------------------------------------------------------------------------------


@pytree
@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges of the hidden values on n sets.

    Attributes:
      lower, upper: (n, N) in float32.
      layout: which values these are; static, as all that follows.
      loose: of which of the layout's variables better bounds may be found.
      free: how many values of functions have lines around them.
    """

    lower: Array
    upper: Array
    layout: "Layout" = dataclasses.field(metadata={"static": True})
    loose: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    free: int = dataclasses.field(metadata={"static": True})


def ranges(model: Traceable, arrays: Any, region: InputSet, n: int) -> Ranges:
    """Ranges by linear bounds with crown's own slopes. Only inside `enable_x64`."""
    graph, rows = model.trace(arrays, n)
    walk, loose = Walk(graph, rows, region, True, jnp.float32), []

    def bound(walk: Walk, v: Var) -> Box:
        loose.append(walk.loose(v))
        return refined(walk, v) if walk.loose(v) else walk.boxes[v]

    walk.run(bound, every=True)
    free = sum(_size(walk, v) for v in walk.lines)
    ends = _flat_ends(walk, [walk.boxes[v] for v in walk.refined])
    return Ranges(*ends, layout(walk), tuple(loose), free)


def with_slopes(
    model: Traceable, arrays: Any, region: InputSet, known: Ranges, count: int, rounds: Any
) -> Ranges:
    """The ranges with slopes optimised for the `count` least decided values of each variable,
    `rounds` times over. Only inside `enable_x64`."""
    import optax

    n = len(known.lower)
    graph, rows = model.trace(arrays, n)
    walk, loose = Walk(graph, rows, region, True, jnp.float32), []
    walk.net = dataclasses.replace(walk.net, reverse_only=True)

    def bound(walk: Walk, v: Var) -> Box:
        loose.extend([v] if walk.loose(v) else [])
        return box_at(known.lower, known.upper, walk, v)

    walk.run(bound, every=True)
    _require_same(known.layout, layout(walk))
    boxes = tightened(walk, loose, count, rounds, 10, optax.adam(0.35))
    lower, upper = _flat_ends(walk, boxes)
    return dataclasses.replace(known, lower=lower, upper=upper)


def _flat_ends(walk: Walk, boxes: list[Box]) -> tuple[Array, Array]:
    """The ends (n, N) of the boxes of the walk's hidden values, rounded outward to float32."""
    none = [jnp.zeros((walk.net.batch, 0))]
    low = [walk.net.flat(box.lower, v) for v, box in zip(walk.refined, boxes, strict=True)]
    high = [walk.net.flat(box.upper, v) for v, box in zip(walk.refined, boxes, strict=True)]
    lower = rounded_down(jnp.concatenate(none + low, 1), jnp.float32)
    return lower, rounded_up(jnp.concatenate(none + high, 1), jnp.float32)


def beginning(
    model: Traceable, options: Options, arrays: Any, question: Question, known: Ranges, steps: int,
) -> Domains:  # fmt: skip
    """One sub-domain for each of n questions of one clause: the whole set, with these ranges. Only
    inside `enable_x64`."""
    n, lower = len(known.lower), known.lower
    weights = question.clauses[:, 0].astype(jnp.float32)
    weights = weights / jnp.maximum(jnp.sum(weights, 1, keepdims=True), 1)
    none = [jnp.zeros((n, m), jnp.float32) for m in (known.free, question.cuts.count)]
    start = Multipliers(none[0], jnp.zeros_like(lower), weights, none[1])
    side = jnp.zeros(lower.shape, jnp.int8)
    nothing = Candidates(*[jnp.zeros((n, 0))] * 3)
    domains = Domains(lower, known.upper, side, start, jnp.zeros(n), nothing, known.layout)
    some = Pass(model, arrays, question, domains)
    ones = jnp.ones((n, len(some.hidden)), jnp.float32)
    multipliers, bound, _ = improved(some, start, ones, steps, 0.3)
    following = candidates(some, multipliers, options.candidates)
    return dataclasses.replace(domains, multipliers=multipliers, bound=bound, next=following)
