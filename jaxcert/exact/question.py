"""The property to decide in the form that a search works with.

Every property is a conjunction of clauses, each of which says that at each point of the set at
least one of its rows is positive. A point breaks the property if and only if all rows of some
clause are at most 0 there.

A set is a box or a ball with cuts, affine functions of the input that are at most 0 on it. To a
search they are rows like those of a clause, exactly known, that belong to every clause.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from jaxcert.bounds import rounding
from jaxcert.model import as_float64, is_traced
from jaxcert.pytrees import pytree
from jaxcert.sets import AnySet, Array, Box, InputSet, Polytope, like, uncut
from jaxcert.specs import AllOf, AnyOf, Property, Spec

MOST_CLAUSES = 10_000


LARGEST = 2.0**400
"""How far numbers of cuts may be apart, and how large inputs may be, for no result to overflow or
underflow."""


@pytree
@dataclasses.dataclass(frozen=True)
class Cuts:
    """For n sets, p affine functions of the input, flattened, that are at most 0 on each:
    matrix x + offset, with largest coefficients from 1/2 to 1 but for functions that are constant.

    Attributes:
      matrix: (n, p, d).
      offset: (n, p).
      inner: a point far inside of each set, to draw others inside; NaN where none was found, and
        nothing, (n, 0), where there are no cuts.
    """

    matrix: Any
    offset: Any
    inner: Any

    @property
    def count(self) -> int:
        """How many functions each set has."""
        return self.offset.shape[1]

    def at(self, x: Array) -> Box:
        """What surely encloses the functions at points (n, *input) in float64: (n, p)."""
        terms = self.matrix * x.reshape(len(x), 1, -1)
        total = jnp.sum(terms, 2) + self.offset
        size = jnp.sum(jnp.abs(terms), 2) + jnp.abs(self.offset)
        d = terms.shape[2]
        error = rounding.inflate(rounding.gamma(d + 32) * size, d)
        return rounding.widen(Box(total - error, total + error), rounding.ARITHMETIC)

    def surely_hold(self, x: Array) -> Array:
        """Whether points (n, *input) satisfy all cuts of their sets, bool (n,).

        Beyond what rounding leaves certain, points on the boundary count where the sum is exact:
        its terms are multiples of a power of two q, and no sum of them reaches 2^53 q, so that
        every partial sum is a float64, in whichever order it is taken.
        """
        flat = x.reshape(len(x), 1, -1)
        terms = self.matrix * flat
        total = jnp.sum(terms, 2) + self.offset
        size = jnp.sum(jnp.abs(terms), 2) + jnp.abs(self.offset)
        q = jnp.min(_lowest_bit(self.matrix) * _lowest_bit(flat), 2, initial=jnp.inf)
        q = jnp.minimum(q, _lowest_bit(self.offset))
        exact = size <= (2.0**53 - 2.0**30) * q
        exact &= q > 1 / LARGEST**2  # else, products may underflow
        return jnp.all((self.at(x).upper <= 0) | (exact & (total <= 0)), 1)


def _lowest_bit(x: Array) -> Array:
    """The largest power of two that float64 numbers are multiples of; infinite for 0."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.int64) & (2**63 - 1)
    rest = jax.lax.bitcast_convert_type(bits & (bits - 1), jnp.float64)
    power = (bits & (2**52 - 1)) == 0  # no bit of the fraction is set
    return jnp.where(bits == 0, jnp.inf, jnp.abs(x) - jnp.where(power, 0.0, rest))


def cuts_of(region: AnySet, n: int, d: int) -> Cuts:
    """The cuts of n sets of d inputs, in numpy's float64 and scaled by powers of two, exactly.

    Raises:
      ValueError: numbers so far apart that sums of products might overflow or underflow.
    """
    if not isinstance(region, Polytope):
        return Cuts(np.zeros((n, 0, d)), np.zeros((n, 0)), np.zeros((n, 0)))
    matrix, offset = (np.asarray(a, np.float64) for a in (region.matrix, region.offset))
    per_set = matrix.ndim > np.ndim(region.lower)
    matrix = matrix.reshape(*matrix.shape[: 1 + per_set], d)
    matrix = np.broadcast_to(matrix, (n, *matrix.shape[-2:]))
    offset = np.broadcast_to(offset, matrix.shape[:2])
    size = np.max(np.abs(matrix), 2)
    offset = np.where(size > 0, offset, np.where(offset > 0, 1.0, -1.0))
    zeros = matrix == 0, offset == 0
    with np.errstate(over="ignore", under="ignore"):
        shift = -np.frexp(size)[1]
        matrix, offset = np.ldexp(matrix, shift[..., None]), np.ldexp(offset, shift)
    ends = np.stack([np.asarray(end, np.float64) for end in (region.lower, region.upper)])
    inside = [(np.abs(a) >= 1 / LARGEST) & (np.abs(a) <= LARGEST) for a in (matrix, offset)]
    known = all(np.all(ok | zero) for ok, zero in zip(inside, zeros, strict=True))
    if not (known and np.all(np.abs(ends) <= LARGEST)):
        raise ValueError(
            "the coefficients and the offset of a linear inequality must be 0 or within a factor "
            "of 2^400 of the largest coefficient, and the box within 2^400 of 0"
        )
    if matrix.shape[1] == 0:
        return Cuts(matrix, offset, np.zeros((n, 0)))
    low, high = ends.reshape(2, n, d)
    inner = [_inner(*parts) for parts in zip(low, high, matrix, offset, strict=True)]
    return Cuts(matrix, offset, np.stack(inner))


def _inner(low: Any, high: Any, matrix: Any, offset: Any) -> np.ndarray:
    """A point of one set for which the least slack of all cuts, in units of what they vary over the
    box, is largest, or NaN."""
    size = np.abs(matrix) @ (high - low)
    found = optimize.linprog(
        np.append(np.zeros(len(low)), -1.0),
        np.append(matrix, size[:, None], 1),
        -offset,
        bounds=[*zip(low, high, strict=True), (0, 1)],
    )
    return np.clip(found.x[:-1], low, high) if found.status == 0 else np.full(len(low), np.nan)


@pytree
@dataclasses.dataclass(frozen=True)
class Question:
    """For n sets: does every clause of rows hold at every point?

    Attributes:
      region: n sets, without their cuts.
      cuts: what they are cut by.
      matrix, offset: the rows C y + d, (n, s, k) and (n, s).
      clauses: which rows each clause has, bool (n, c, s); a clause without rows is padding.
    """

    region: InputSet
    cuts: Cuts
    matrix: Any
    offset: Any
    clauses: Any

    @property
    def rows(self) -> Spec:
        """The rows as a spec."""
        return Spec(self.matrix, self.offset)

    @property
    def whole(self) -> AnySet:
        """The sets with their cuts."""
        if not self.cuts.count:
            return self.region
        assert isinstance(self.region, Box)
        lower, upper = self.region.lower, self.region.upper
        matrix = self.cuts.matrix.reshape(len(lower), self.cuts.count, *lower.shape[1:])
        return Polytope(lower, upper, matrix, self.cuts.offset)


def one_by_one(region: AnySet) -> AnySet:
    """The sets with every array but inequalities spread over the batch, in float64. Only inside
    `enable_x64`."""
    if isinstance(region, Polytope):
        lower, upper = as_float64((jnp.asarray(region.lower), jnp.asarray(region.upper)))
        return Polytope(lower, upper, region.matrix, region.offset)
    region = as_float64(jax.tree.map(jnp.asarray, region))
    if isinstance(region, Box | Polytope):
        return region
    shape = region.x.shape
    valid = jax.tree.map(lambda end: jnp.broadcast_to(end, shape), region.valid)
    return dataclasses.replace(region, eps=jnp.broadcast_to(region.eps, shape[:1]), valid=valid)


def question(region: AnySet, prop: Property, n: int, k: int) -> Question:
    """A property of k outputs on n sets, whose arrays are spread over the batch, as a question; all
    but the sets' own arrays and traced rows in numpy's float64. Only inside `enable_x64`.

    Raises:
      ValueError: wrong shapes, known rows that are not finite, or more than `MOST_CLAUSES` clauses.
    """
    cuts = cuts_of(region, n, math.prod(np.shape(like(region))[1:]))
    specs: list[tuple[Any, Any]] = []
    groups = _conjunctive(prop, specs, n, k)
    traced = is_traced(specs)
    lib: Any = jnp if traced else np
    matrix, offset = (lib.concatenate(parts, 1) for parts in zip(*specs, strict=True))
    if not traced and not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
        raise ValueError("the rows of a property must be finite numbers")
    clauses = np.zeros((len(groups), matrix.shape[1]), bool)
    for clause, rows in zip(clauses, groups, strict=True):
        clause[list(rows)] = True
    clauses = np.broadcast_to(clauses, (n, *clauses.shape))
    return Question(uncut(region), cuts, matrix, offset, clauses)


def _conjunctive(prop: Property, specs: list, n: int, k: int) -> list[frozenset[int]]:
    """The clauses of a property as sets of places in `specs`, which is filled up."""
    if isinstance(prop, Spec):
        start = sum(m.shape[1] for m, _ in specs)
        specs.append(_per_set(prop, n, k))
        return [frozenset([start + i]) for i in range(specs[-1][0].shape[1])]
    if not isinstance(prop, AllOf | AnyOf):
        raise TypeError(f"a property is a Spec, an AllOf or an AnyOf, got {type(prop).__name__}")
    if not prop.parts:
        raise ValueError(f"an {type(prop).__name__} without parts states nothing")
    parts = [_conjunctive(part, specs, n, k) for part in prop.parts]
    if isinstance(prop, AllOf):
        found = list(dict.fromkeys(itertools.chain(*parts)))
    else:
        found = [frozenset()]
        for part in parts:
            found = list(dict.fromkeys(a | b for a in found for b in part))
            _require_few(len(found))
    _require_few(len(found))
    return found


def _require_few(count: int) -> None:
    if count > MOST_CLAUSES:
        raise ValueError(
            f"the property has more than {MOST_CLAUSES} clauses when its AnyOf groups are "
            "multiplied out; state it as several properties"
        )


def _per_set(spec: Spec, n: int, k: int) -> tuple[Any, Any]:
    traced = is_traced(spec)
    lib: Any = jnp if traced else np
    matrix, offset = spec.matrix, spec.offset
    if traced:
        matrix, offset = as_float64((jnp.asarray(matrix), jnp.asarray(offset)))
    matrix, offset = lib.asarray(matrix, np.float64), lib.asarray(offset, np.float64)
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != k or matrix.shape[:-2] not in ((), (n,)):
        raise ValueError(
            f"the rows of a spec must be (s, {k}) or ({n}, s, {k}) for {n} sets and {k} outputs, "
            f"got {matrix.shape}"
        )
    matrix = lib.broadcast_to(matrix, (n, *matrix.shape[-2:]))
    return matrix, lib.broadcast_to(offset, matrix.shape[:2])


def rows_at(question: Question, outputs: Array, index: Array) -> Array:
    """C y + d (m, s) for outputs (m, k), row i under question index[i]."""
    matrix = jnp.asarray(question.matrix, outputs.dtype)[index]
    offset = jnp.asarray(question.offset, outputs.dtype)[index]
    return jnp.sum(matrix * outputs[:, None, :], 2) + offset


def shortfall(rows: Array, clauses: Array) -> Array:
    """How far each clause is from being broken, (m, c): its largest row, at most 0 if broken."""
    largest = jnp.max(jnp.where(clauses, rows[:, None, :], -jnp.inf), 2)
    return jnp.where(jnp.any(clauses, 2), largest, jnp.inf)


# --- Few shapes, so that few programs serve all questions -----------------------------------------


def rounded(n: int) -> int:
    """n or somewhat more, so that few programs serve all numbers: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if n <= 3 * power // 4 else power


def padded(asked: Question) -> Question:
    """The question with rows, clauses and cuts that state nothing, up to one of few numbers."""
    clauses, rows = (
        max(least, rounded(m)) for least, m in zip((4, 8), asked.clauses.shape[1:], strict=True)
    )
    cuts = max(4, rounded(asked.cuts.count)) if asked.cuts.count else 0
    more = max(clauses - asked.clauses.shape[1], 0), max(rows - asked.clauses.shape[2], 0)
    extra = cuts - asked.cuts.count
    return Question(
        asked.region,
        Cuts(
            np.pad(asked.cuts.matrix, [(0, 0), (0, extra), (0, 0)]),
            np.pad(asked.cuts.offset, [(0, 0), (0, extra)], constant_values=-1.0),
            asked.cuts.inner,
        ),
        np.pad(asked.matrix, [(0, 0), (0, more[1]), (0, 0)]),
        np.pad(asked.offset, [(0, 0), (0, more[1])]),
        np.pad(asked.clauses, [(0, 0), (0, more[0]), (0, more[1])]),
    )


def each_clause(asked: Question, here: np.ndarray, clause: np.ndarray) -> Question:
    """One question for each pair of a set and a clause. Rows of other clauses fill up what the
    longest one has more; only `clauses` says which are a clause's own."""
    clauses = np.asarray(asked.clauses)[here, clause]
    most = rounded(int(clauses.sum(1).max()))
    order = np.argsort(~clauses, axis=1, kind="stable")[:, :most]
    region, cuts = jax.tree.map(lambda a: a[here], (asked.region, asked.cuts))
    return Question(
        region,
        cuts,
        jnp.asarray(np.asarray(asked.matrix)[here[:, None], order]),
        jnp.asarray(np.asarray(asked.offset)[here[:, None], order]),
        jnp.asarray(np.take_along_axis(clauses, order, 1)[:, None]),
    )
