"""Branching on hidden values: the range of one operand of a nonlinear function, cut in two.

For models of many inputs. What is split next is found by looking at the gap that each function
leaves, and among the few with the largest by bounding the halves (De Palma et al., "Improved branch
and bound for neural network verification via Lagrangian decomposition", 2021).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.attacks import gradient
from jaxcert.bounds.interpreter import lower, operand
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.relaxations import value_at
from jaxcert.bounds.walk import Walk, cast
from jaxcert.exact.beta_crown import Pass, improved
from jaxcert.exact.domains import Candidates, Domains, Multipliers
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question
from jaxcert.exact.search import Expansion
from jaxcert.graph import Var
from jaxcert.sets import Array, Box


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
