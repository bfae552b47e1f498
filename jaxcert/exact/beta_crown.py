"""Linear bounds on sub-domains of hidden values, with multipliers that gradient ascent improves.

With l <= z <= u known of a hidden value z, and a multiplier m,

    row >= row + m z - max(m, 0) u - min(m, 0) l,

so that the linear bound is pulled back with m added to the coefficients of z (beta-CROWN, Wang et
al., NeurIPS 2021). Multipliers and slopes of all sub-domains of a batch are improved together, from
where their parents' left off; every iterate is a bound, rounding counted. So are multipliers m >= 0
of the set's cuts: row >= row + m (a x + b), as a x + b <= 0.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import ancestors, pull_back
from jaxcert.bounds.concretise import least
from jaxcert.bounds.hidden import with_dust
from jaxcert.bounds.linear import Goal, shifted
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.slopes import Free, free_lines
from jaxcert.bounds.walk import Walk, size_of
from jaxcert.exact.domains import Domains, Multipliers, box_at, layout, require_same, width
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question
from jaxcert.graph import Var
from jaxcert.sets import Array, Box, per_example
from jaxcert.specs import Spec


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
        require_same(domains.layout, layout(self.walk))
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
            size = width(self.walk, v)
            found[v] = self.walk.net.shaped(values[:, start : start + size], v)
            start += size
        return found

    def spread(self, values: Array) -> Array:
        """One number per hidden variable (k, v) at each of its values, (k, n)."""
        parts = [
            jnp.broadcast_to(values[:, i : i + 1], (len(values), width(self.walk, v)))
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
