"""Linear bounds of a flat net, in float64 with every rounding counted, or in rationals.

For the checker of proofs (`proof.py`): NumPy and fractions only, and slopes and multipliers from
whoever claims that they are good. Any of them in their ranges give a bound that holds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from jaxcert.errors import ProofRejected
from jaxcert.exact.flat import Net, Step
from jaxcert.io.unsafe import rounded_down, rounded_up

Array: TypeAlias = Any


Slopes: TypeAlias = Callable[[int, Array, "Domain"], Array | None]
"""(kink, entries (m,), what is known so far) -> slopes (2 m, all kinks) for the lower and then the
upper bounds of these entries of the kink's operand, NaN where they are adaptive; None for all."""


# For rows A on a value v, the pass keeps  row >= sum_v A_v v + low - lost.  At
#
#     v = M x + t:      A v  =  (A M) x + A t,
#     y = max(a z, z):  A y >=  (A+ s + A- c) z + A- t,  since y >= s z for any s in [a, 1], and the
#                       convex y - c z is at most t, the larger one of its values at l and u,
#     l <= z <= u:      row >= row + p (l - z) + q (z - u)  for any multipliers p, q >= 0,
#
# and at the input A x is least at a corner of the box. (This is CROWN and beta-CROWN; c is the
# slope of the chord from l to u.)
#
# A sum of n products in float64 errs in any order by at most gamma_n times the sum of their sizes,
# gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
# With sizes S >= |M| |x| + |t|, and 2 |z| for a kink, all that is rounded while A passes v is at
# most gamma |A| S, even if M itself was rounded a few times. That is added to `lost`, with a gamma
# for all: twice what the longest sum needs, so that `lost` may be rounded, too. What underflows is
# far below DUST as long as |A| < 2^300 and S < 2^100. Of rationals nothing is lost, and they stay
# short because boxes, slopes and multipliers are float64 in any case, boxes rounded outward.

DUST = 2.0**-600
ROWS = 256  # of hidden values bounded at a time


@dataclasses.dataclass
class Domain:
    """Boxes (b, n) of float64 around all values of a net, and sizes S as above."""

    lower: list[Array]
    upper: list[Array]
    size: list[Array]

    def copy(self) -> "Domain":
        """The same, with lists of its own."""
        return Domain(list(self.lower), list(self.upper), list(self.size))


class Bounds:
    """Bounds of a net's values.

    Attributes:
      net: the net.
      exact: whether rows are rationals.
      parts: where each kink's slopes are among those of all.
      least: the least slopes there are, (entries,).
    """

    def __init__(self, net: Net, exact: bool = False):
        self.net, self.exact = net, exact
        self.steps = [s and s.converted(self.number) for s in net.steps]
        terms = max([*net.sizes, *(step.terms for step in net.steps if step)])
        self.gamma = 0.0 if exact else 2 * (terms + len(net.steps) + 64) * 2.0**-53
        sizes = [net.sizes[y] for y in net.kinks]
        self.parts = [slice(end - n, end) for n, end in zip(sizes, np.cumsum(sizes), strict=True)]
        self.least = np.concatenate([[], *(np.full(net.sizes[y], net.left(y)) for y in net.kinks)])
        self.entries = len(self.least)

    def number(self, a: Array) -> Array:
        """An array in the arithmetic of rows."""
        if not self.exact:
            return np.asarray(a, np.float64)
        return np.asarray(np.frompyfunc(Fraction, 1, 1)(a), object)

    def _outward(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        if not self.exact:
            return lower - DUST, upper + DUST
        ends = (rounded_down, lower), (rounded_up, upper)
        low, high = (np.asarray(np.frompyfunc(f, 1, 1)(a), np.float64) for f, a in ends)
        return low, high

    # --- Boxes

    def domain(self, lower: Array, upper: Array, slopes: Slopes | None = None) -> Domain:
        """Boxes of all values for inputs in boxes (b, n), from intervals and from linear bounds of
        what kinks are of, with given slopes or adaptive ones."""
        found = Domain([lower], [upper], [np.maximum(abs(lower), abs(upper))])
        level = [0]
        for v, step in enumerate(self.steps):
            if step is None:
                continue
            low, high, size = self._interval(step, found)
            found.lower.append(low)
            found.upper.append(high)
            found.size.append(size)
            level.append(step.level([level[x] for x, _ in step.parts]))
            if level[v] == 2 and v in map(self.net.operand, self.net.kinks):
                self._refine(found, v, slopes)
            ends = abs(found.lower[v]), abs(found.upper[v]), size
            if not all((end < 2.0**100).all() for end in ends):
                raise ProofRejected("the net's values are not known to be below 2^100")
        return found

    def _interval(self, step: Step, known: Domain) -> tuple[Array, Array, Array]:
        """|M x - M m| <= |M| r around the middle m of a box with radius r."""
        if step.left is not None:
            ((x, _),) = step.parts
            low, high = (self.number(end[x]) for end in (known.lower, known.upper))
            size = 2 * np.maximum(abs(known.lower[x]), abs(known.upper[x]))
            left = self.number(step.left)
            low, high = (np.maximum(left * end, end) for end in (low, high))
            error = 0 if self.exact else self.gamma * size
            return *self._outward(low - error, high + error), size
        centre, radius, size = step.offset, 0, abs(step.offset)
        for x, weight in step.parts:
            low, high = self.number(known.lower[x]), self.number(known.upper[x])
            middle = (low + high) / 2
            reach = np.maximum(high - middle, middle - low)
            centre = centre + weight.apply(middle)
            radius = radius + weight.size.apply(reach)
            size = size + weight.size.apply(abs(middle) + reach)
        error = radius + (0 if self.exact else self.gamma * size)
        size = np.zeros(centre.shape) if self.exact else size
        return *self._outward(centre - error, centre + error), size

    def _refine(self, known: Domain, v: int, slopes: Slopes | None) -> None:
        """Linear bounds of those entries of a kink's operand v whose interval holds the kink."""
        low, high = known.lower[v], known.upper[v]
        kink = next(k for k, y in enumerate(self.net.kinks) if self.net.operand(y) == v)
        crosses = (low < 0) & (high > 0)
        index = np.flatnonzero(crosses.any(0))
        for start in range(0, len(index), ROWS):
            some = index[start : start + ROWS]
            m = len(some)
            given = slopes(kink, some, known) if slopes else None
            given = np.full((2 * m, self.entries), np.nan) if given is None else given
            rows = np.zeros((2 * m, low.shape[1]))
            rows[range(m), some], rows[range(m, 2 * m), some] = 1, -1
            found, _ = self.below(v, self.number(rows[None]), known, given[None])
            least, most = self._outward(found[:, :m], -found[:, m:])
            mine = crosses[
                :, some
            ]  # of the others nothing is changed, whatever else is in the batch
            low[:, some] = np.where(mine, np.maximum(low[:, some], least), low[:, some])
            high[:, some] = np.where(mine, np.minimum(high[:, some], most), high[:, some])

    # --- Rows

    def below(
        self, start: int, rows: Array, known: Domain, slopes: Array, pushes: Mapping | None = None
    ) -> tuple[Array, Array]:
        """Lower bounds (b, r) of rows (b, r, n) on the value `start`, and A (b, r, m) at the input.

        Args:
          slopes: of the lines below kinks, (b, r, all kinks); NaN for 1 where u > -l, else a.
          pushes: multipliers p, q >= 0 (b, n) each, by value.
        """
        pending, low, lost, rest = {start: rows}, 0, 0, rows
        for v in range(start, -1, -1):
            if v not in pending:
                continue
            rest = pending.pop(v)
            weight = abs(rest)
            if pushes and v in pushes:
                p, q = (self.number(m)[:, None] for m in pushes[v])
                rest, weight = rest - p + q, weight + p + q
                low = low + _dot(p, self.number(known.lower[v]))
                low = low - _dot(q, self.number(known.upper[v]))
            if not self.exact:
                if not weight.max(initial=0) < 2.0**300:
                    raise ProofRejected("a bound has coefficients that are not below 2^300")
                lost = lost + self.gamma * _dot(weight, known.size[v])
            parts, more = self._pulled(v, rest, known, slopes) if v else ([], 0)
            low = low + more
            for x, part in parts:
                pending[x] = pending[x] + part if x in pending else part
        low = low + _dot(np.maximum(rest, 0), self.number(known.lower[0]))
        low = low + _dot(np.minimum(rest, 0), self.number(known.upper[0]))
        return low - lost if self.exact else low - lost - DUST, rest

    def _pulled(self, v: int, rows: Array, known: Domain, slopes: Array) -> tuple[list, Array]:
        """Rows on v as rows on its operands, and what is added to `low`."""
        step = self.steps[v]
        assert step is not None
        if step.left is None:
            parts = [(x, weight.pull(rows)) for x, weight in step.parts]
            return parts, _dot(rows, step.offset)
        ((x, _),) = step.parts
        l, u = known.lower[x], known.upper[x]
        given = slopes[:, :, self.parts[self.net.kinks.index(v)]]
        chord, better = _chord(l, u, step.left)[:, None], np.where(u > -l, 1.0, step.left)[:, None]
        crosses = ((l < 0) & (u > 0))[:, None]
        below = np.where(crosses, np.where(np.isnan(given), better, given), chord)
        chord, below, l, u = (self.number(a) for a in (chord, below, l[:, None], u[:, None]))
        left = self.number(step.left)
        above = np.maximum(*(np.maximum(left * end, end) - chord * end for end in (l, u)))
        up, down = np.maximum(rows, 0), np.minimum(rows, 0)
        return [(x, up * below + down * chord)], _dot(down, above[:, 0])


def adaptive(bounds: Bounds, known: Domain) -> Array:
    """The slopes of the better one of each kink's two pieces, (b, all kinks)."""
    parts = [np.where(u > -l, 1.0, left) for l, u, left in _kinks(bounds, known)]
    return np.concatenate(parts, 1)


def chords(bounds: Bounds, known: Domain) -> Array:
    """The slopes of the chords of the kinks, (b, all kinks)."""
    return np.concatenate([_chord(*kink) for kink in _kinks(bounds, known)], 1)


def _kinks(bounds: Bounds, known: Domain) -> Iterator[tuple[Array, Array, float]]:
    for y in bounds.net.kinks:
        z = bounds.net.operand(y)
        yield known.lower[z], known.upper[z], bounds.net.left(y)


def _chord(l: Array, u: Array, left: float) -> Array:
    """The slopes of the chords from l to u, or of the one piece that these are on."""
    share = np.maximum(u, 0) / np.where(u > l, np.maximum(u, 0) - np.minimum(l, 0), 1)
    slope = np.clip(left + (1 - left) * share, left, 1)
    return np.where(l >= 0, 1.0, np.where(u <= 0, left, slope))


def _dot(rows: Array, vector: Array) -> Array:
    return np.matmul(rows, vector[..., None])[..., 0]
