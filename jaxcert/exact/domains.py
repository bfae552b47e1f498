"""Sub-domains of a search on hidden values, and which hidden values these are.

A sub-domain is a set of inputs that put some hidden values into given ranges, for one row of the
question.
"""

import dataclasses
import math

from jaxcert.bounds.walk import Walk
from jaxcert.exact.outline import Outline, outline, require_alike
from jaxcert.graph import Var
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Box


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
class Layout:
    """Which hidden values there are: of which graph, and of which variables how many."""

    outline: Outline
    sizes: tuple[int, ...]


def layout(walk: Walk) -> Layout:
    """The hidden variables that a walk has bounded."""
    sizes = tuple(width(walk, v) for v in walk.refined)
    return Layout(outline(walk.net.graph, walk.net.batch), sizes)


def require_same(known: Layout, own: Layout) -> None:
    """Ranges are found for one batch size and used for another: they must be of the same values."""
    require_alike(known.outline, own.outline)
    if known.sizes != own.sizes:  # not an assert, which may be switched off
        raise AssertionError("one graph has its hidden values in one order")


def width(walk: Walk, v: Var) -> int:
    """How many hidden values a variable is, for each example."""
    return math.prod(walk.net.outer_and_inner(v))


def box_at(lower: Array, upper: Array, walk: Walk, v: Var) -> Box:
    """The box of the next hidden value v of a walk, whose ranges (k, n) are given."""
    start = sum(width(walk, w) for w in walk.refined)
    part = slice(start, start + width(walk, v))
    ends = lower[:, part], upper[:, part]
    return Box(*[walk.net.shaped(end.astype(walk.dtype), v) for end in ends])
