"""Ranges of hidden values on whole sets, and the search's beginning: each set as a sub-domain."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxcert.bounds.hidden import refined
from jaxcert.bounds.slopes import tightened
from jaxcert.bounds.walk import Walk
from jaxcert.exact.beta_crown import Pass, improved
from jaxcert.exact.branching import Options, candidates
from jaxcert.exact.domains import (
    Candidates,
    Domains,
    Layout,
    Multipliers,
    box_at,
    layout,
    require_same,
    width,
)
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.graph import Var
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box, InputSet


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
    layout: Layout = dataclasses.field(metadata={"static": True})
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
    free = sum(width(walk, v) for v in walk.lines)
    ends = _flat_ends(walk, [walk.boxes[v] for v in walk.refined])
    return Ranges(*ends, layout(walk), tuple(loose), free)


def with_slopes(
    model: Traceable, arrays: Any, region: InputSet, known: Ranges, count: int
) -> Ranges:
    """The ranges with slopes optimised for the `count` least decided values of each variable.
    Only inside `enable_x64`."""
    import optax

    n = len(known.lower)
    graph, rows = model.trace(arrays, n)
    walk, loose = Walk(graph, rows, region, True, jnp.float32), []
    walk.net = dataclasses.replace(walk.net, reverse_only=True)

    def bound(walk: Walk, v: Var) -> Box:
        loose.extend([v] if walk.loose(v) else [])
        return box_at(known.lower, known.upper, walk, v)

    walk.run(bound, every=True)
    require_same(known.layout, layout(walk))
    boxes = tightened(walk, loose, count, 10, optax.adam(0.35))
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
