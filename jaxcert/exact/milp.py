"""Piecewise linear models as mixed-integer programs, solved by SciPy's HiGHS.

The least value of a row over a set, exactly up to the solver's tolerances (Tjeng, Xiao, Tedrake,
"Evaluating robustness of neural networks with mixed integer programming", ICLR 2019). It is for
small models, up to some hundreds of hidden values of unsure sign, and shares neither relaxations
nor branching with the other methods, which makes it a check on them.

A value of the model is an affine function of the program's columns: the input's entries, and for
each kink two more, its result y and a binary d. Affine equations are followed exactly, so that no
column stands for what they compute. With l <= z <= u and l < 0 < u,

    y = max(z, 0)   iff   y >= 0,  y >= z,  y <= u d,  y <= z - l (1 - d)   for a d in {0, 1},

and every other elementwise function here is a sum of such maxima:

    leaky(z) = a z + (1 - a) relu(z),     |z| = 2 relu(z) - z,
    max(z, c) = relu(z - c) + c,          min(z, c) = c - relu(c - z).

A clause of rows is broken where t = max_i row_i is at most 0. The program minimises t, subject to
t >= row_i.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.linear import Hidden, bounder, crown
from jaxcert.bounds.planes import is_affine
from jaxcert.bounds.products import exact_products
from jaxcert.bounds.walk import BoundHidden, Walk
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question, question, rows_at
from jaxcert.floats import ieee_float64
from jaxcert.graph import Equation, Graph, Var, holds_all, read, unsupported
from jaxcert.model import Model, as_float64, is_traced, output_shape, split, uses_float64
from jaxcert.sets import Box, InputSet, L1Ball, L2Ball, checked, contains, project
from jaxcert.specs import Property, Spec
from jaxcert.tracing import Traced

TOLERANCE = 1e-5
"""How far from 0 a bound must be to decide anything; HiGHS works to 1e-7."""


def verify(
    f: Model,
    region: InputSet,
    spec: Property,
    *,
    seconds: float = 60.0,
    hidden: Hidden | None = None,
) -> Verdict:
    """Decide whether a property of f holds on the whole set, one program per example and clause.

    VERIFIED: the solver's dual bound on every clause is above `TOLERANCE`. This holds up to HiGHS's
    own tolerance of 1e-7 and is no proof with rounding counted. FALSIFIED: a point of the set, in
    the input's own type, at which f breaks the property, computed as the caller computes it and in
    float64. UNKNOWN otherwise.

    Args:
      f: the model, (b, *input) -> (b, k), rows independent, made of affine equations and relu,
        leaky_relu, abs, max, min, clamp and reductions and pooling by max or min. Casts to float32
        count as exact.
      region: a `Box`, `LinfBall` or `L1Ball`.
      spec: the property, a `Spec` or `AllOf` and `AnyOf` of them.
      seconds: for the whole call; each program gets an equal share of what is left.
      hidden: how hidden values are bounded, as for `bounds.alpha_crown`; boxes must come from
        `hidden_bounds(f, outward=True)`. By default as `crown` does.

    Returns:
      A `Verdict`. The reason is TIME where the time did not suffice, else NUMERICS: the least value
      is within `TOLERANCE` of 0, or the solver failed.

    Raises:
      ValueError, TypeError: an `L2Ball`, traced values, wrong shapes or dtypes.
      UnsupportedEquation: an equation is not piecewise linear, or casts below float32.

    Host side: not for use in jit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, explain, margins
      >>> weights = jnp.array([[1.0, -1.0], [1.0, 1.0]])
      >>> x = jnp.array([[1.0, 0.0], [0.5, 0.5]])
      >>> verdict = verify(
      ...     lambda x: jnp.maximum(x @ weights, 0), LinfBall(x, 0.6), margins(jnp.array([0, 0]), 2)
      ... )
      >>> print(explain(verdict), verdict.counterexample[1, 0] <= 0)
      ['VERIFIED: decided', 'FALSIFIED: decided'] True
    """
    clock = _Clock(seconds)
    task = _Task.of(f, region, hidden)
    asked = question(task.region, spec, task.n, task.k)
    count = asked.clauses.shape[1]
    found = [
        _decided(task, asked, i, clock, functools.partial(_left, task.n * count, i * count))
        for i in range(task.n)
    ]
    status, reason, points = zip(*found, strict=True)
    example = None
    if Status.FALSIFIED in status:
        blank = np.zeros(task.model.shape)
        example = np.stack([blank if p is None else p for p in points])
        with jax.enable_x64(True):
            example = jnp.asarray(example).astype(task.model.dtype)
    return Verdict(jnp.array(status, jnp.int32), jnp.array(reason, jnp.int32), example)


@dataclasses.dataclass(frozen=True)
class Minimum:
    """Where the least value of each row lies, in numpy's float64.

    Attributes:
      lower: the solver's dual bound, (b, s); -inf where it has none.
      upper: the row at `point`, (b, s), by the model in float64; inf where no point was found.
      point: the best inputs found, (b, s, *input), NaN where there is none.
    """

    lower: np.ndarray
    upper: np.ndarray
    point: np.ndarray


def minimum(
    f: Model,
    region: InputSet,
    spec: Spec,
    *,
    seconds: float = 60.0,
    hidden: Hidden | None = None,
) -> Minimum:
    """Find the least value of each row of C f(x) + d over the set, between two bounds.

    The lower one holds up to HiGHS's tolerance of 1e-7, so it is no proof with rounding counted;
    the upper one is attained, up to the rounding of float64.

    Arguments and errors as for `verify`, but for the spec, which is a plain `Spec`. A program that
    runs out of time leaves its bounds apart.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x) - 0.5 * x
      >>> found = minimum(f, LinfBall(jnp.full((1, 1), 0.25), 1.0), Spec(jnp.eye(1)))
      >>> print(found.lower, found.upper, found.point)
      [[0.]] [[0.]] [[[0.]]]
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"minimum needs the rows of one Spec, got {type(spec).__name__}")
    clock = _Clock(seconds)
    task = _Task.of(f, region, hidden)
    asked = question(task.region, spec, task.n, task.k)
    count = asked.matrix.shape[1]
    lower = np.full((task.n, count), -np.inf)
    upper = np.full((task.n, count), np.inf)
    point = np.full((task.n, count, *task.model.shape), np.nan)
    for i in range(task.n):
        program = task.program(i) if clock.share(1) > 0 else None
        for j in range(count if program else 0):
            share = clock.share(_left(task.n * count, i * count, j))
            found = program.least(asked.matrix[i, [j]], asked.offset[i, [j]], share)
            lower[i, j] = found.lower
            if found.x is not None:
                point[i, j] = task.inside(i, found.x)
                upper[i, j] = task.rows(asked, i, point[i, j])[j]
    return Minimum(lower, upper, point)


def _left(total: int, before: int, done: int) -> int:
    """How many programs are left, of which an example's first comes after `before` others."""
    return total - before - done


class _Clock:
    """What is left of a time limit."""

    def __init__(self, seconds: float):
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        self._end = time.monotonic() + seconds

    def share(self, parts: int) -> float:
        """An equal share of the seconds left, 0 if there are none."""
        return max(0.0, self._end - time.monotonic()) / parts


def _decided(
    task: "_Task", asked: Question, i: int, clock: _Clock, left: Callable[[int], int]
) -> tuple[Status, Reason, np.ndarray | None]:
    """The answer for example i, with a counterexample if there is one."""
    if clock.share(1) <= 0:
        return Status.UNKNOWN, Reason.TIME, None
    program, open_for = task.program(i), set()
    for j, clause in enumerate(asked.clauses[i]):
        found = program.least(
            asked.matrix[i, clause], asked.offset[i, clause], clock.share(left(j))
        )
        if found.x is not None:
            point = task.rounded(i, task.inside(i, found.x))
            if task.breaks(asked, i, point):
                return Status.FALSIFIED, Reason.NONE, point
        if not found.lower > TOLERANCE:
            open_for.add(Reason.TIME if found.out_of_time else Reason.NUMERICS)
    if not open_for:
        return Status.VERIFIED, Reason.NONE, None
    return Status.UNKNOWN, min(open_for), None


# --- A model and its sets -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A model on n sets, whose arrays are in float64.

    Attributes:
      model, arrays: the model.
      region: the sets.
      n, k: how many they are, and how many outputs the model has.
      hidden: how hidden values are bounded.
      traced: the model's graph at a batch of one.
    """

    model: Traceable
    arrays: Any
    region: InputSet
    n: int
    k: int
    hidden: Hidden | None
    traced: Traced

    @classmethod
    def of(cls, f: Model, region: InputSet, hidden: Hidden | None) -> "_Task":
        """The task, with everything checked that can be."""
        arrays, structure = split(f)
        if is_traced(arrays, region):
            raise TypeError("mixed-integer programs are solved on the host: call this outside jit")
        region = checked(region)
        if isinstance(region, L2Ball):
            raise ValueError(
                "an L2Ball is no linear constraint: pass a Box, LinfBall or L1Ball, such as "
                "jaxcert.sets.bounding_box(ball), or use bounds.crown, which takes L2 balls"
            )
        x = region.lower if isinstance(region, Box) else region.x
        k = output_shape(structure, arrays, x).shape[1]
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        model = Traceable(structure, tuple(x.shape[1:]), dtype, uses_float64(), ())
        with jax.enable_x64(True):
            arrays, region = ieee_float64((arrays, region))
            traced = model.trace(arrays, 1)
            return cls(model, arrays, as_float64(region), len(x), k, hidden, traced)

    def program(self, i: int) -> "Program":
        """The model on set i."""
        with jax.enable_x64(True):
            return encoded(self.traced, _single(self.region, i), self._hidden(i))

    def _hidden(self, i: int) -> BoundHidden | None:
        # All rows at once: a loop over chunks of them would be compiled anew for each example.
        if isinstance(self.hidden, tuple | list):
            return bounder([jax.tree.map(lambda end: end[i : i + 1], b) for b in self.hidden])
        return bounder(crown if self.hidden is None else self.hidden, chunk=1 << 20)

    def inside(self, i: int, x: np.ndarray) -> np.ndarray:
        """The point of set i nearest to x."""
        with jax.enable_x64(True):
            flat = jnp.asarray(x).reshape(1, *self.model.shape)
            return np.asarray(project(_single(self.region, i), flat)[0])

    def rounded(self, i: int, point: np.ndarray) -> np.ndarray:
        """A point of set i rounded to the input's type, towards the centre, where the set goes on."""
        region = _single(self.region, i)
        ball = not isinstance(region, Box)
        centre = np.asarray(region.x if ball else region.lower / 2 + region.upper / 2)[0]
        near = point.astype(self.model.dtype)
        back = np.nextafter(near, centre.astype(self.model.dtype))
        beyond = np.abs(near.astype(np.float64) - centre) > np.abs(point - centre)
        return np.where(beyond, back, near).astype(np.float64)

    def breaks(self, asked: Question, i: int, point: np.ndarray) -> bool:
        """Whether a point lies in set i and the model breaks the property there, replayed in the
        caller's arithmetic and in float64."""
        with jax.enable_x64(True):
            x = jnp.asarray(point)[None]
            broken, _ = self.model.tried(self.arrays, asked, x, np.array([i]))
            return bool(broken[0] & contains(_single(self.region, i), x)[0])

    def rows(self, asked: Question, i: int, point: np.ndarray) -> np.ndarray:
        """The rows of question i (s,) at a point, in float64."""
        with jax.enable_x64(True):
            outputs = self.model.structure.build(as_float64(self.arrays))(jnp.asarray(point)[None])
            return np.asarray(rows_at(asked, outputs.astype(jnp.float64), np.array([i]))[0])


def _single(region: InputSet, i: int) -> Any:
    """Set i as a batch of one."""
    if isinstance(region, Box):
        return Box(region.lower[i : i + 1], region.upper[i : i + 1])
    valid = region.valid
    if valid is not None:
        ends = (jnp.broadcast_to(end, region.x.shape) for end in (valid.lower, valid.upper))
        valid = _single(Box(*ends), i)
    eps = jnp.broadcast_to(region.eps, region.x.shape[:1])
    return type(region)(region.x[i : i + 1], eps[i : i + 1], valid)


# --- Values of the model --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Affine:
    """Values sum_j columns[j] p_j + offset in [lower, upper], with p the columns of a program.

    Attributes:
      columns: coefficients of the first m columns, (m, *shape); those of later ones are 0.
      offset, lower, upper: of the values' shape; an unknown end is NaN.
    """

    columns: np.ndarray
    offset: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def wide(self, count: int) -> np.ndarray:
        """The coefficients of `count` columns."""
        missing = np.zeros((count - len(self.columns), *self.offset.shape))
        return np.concatenate([self.columns, missing]) if len(missing) else self.columns

    def within(self, box: Any) -> "Affine":
        """The same values, known to lie in a box."""
        lower, upper = np.asarray(box.lower), np.asarray(box.upper)
        return dataclasses.replace(
            self, lower=np.minimum(lower, upper), upper=np.maximum(lower, upper)
        )

    def __add__(self, other: Any) -> "Affine":
        if not isinstance(other, Affine):
            c = np.asarray(other)
            return Affine(self.columns, self.offset + c, self.lower + c, self.upper + c)
        count = max(len(self.columns), len(other.columns))
        return Affine(
            self.wide(count) + other.wide(count),
            self.offset + other.offset,
            self.lower + other.lower,
            self.upper + other.upper,
        )

    def __mul__(self, factor: Any) -> "Affine":
        a = np.asarray(factor)
        ends = a * self.lower, a * self.upper
        return Affine(a * self.columns, a * self.offset, np.minimum(*ends), np.maximum(*ends))

    def __neg__(self) -> "Affine":
        return self * -1.0

    def __sub__(self, other: Any) -> "Affine":
        return self + -other


@dataclasses.dataclass(frozen=True)
class Solution:
    """What the solver says of a program.

    Attributes:
      lower: its dual bound, -inf if it has none.
      x: the input's entries at the best point, flat, or None.
      out_of_time: whether the time limit ended it.
    """

    lower: float
    x: np.ndarray | None
    out_of_time: bool


class Program:
    """Columns with their ends, and rows of linear inequalities, that describe a model on a set.

    Attributes:
      output: the model's outputs, (k,).
      binaries: how many of the columns are 0 or 1.
    """

    output: Affine

    def __init__(self, box: Box):
        self._ends: list[tuple[np.ndarray, np.ndarray, bool]] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.count = self.binaries = 0
        lower, upper = np.asarray(box.lower), np.asarray(box.upper)
        self._inputs = lower.size
        place = self.columns(lower.ravel(), upper.ravel())
        unit = np.eye(place.size).reshape(-1, *lower.shape)
        self.input = Affine(unit, np.zeros(lower.shape), lower, upper)

    def columns(self, lower: Any, upper: Any, binary: bool = False) -> np.ndarray:
        """The places of new columns with these ends, (n,) each."""
        self._ends.append((lower, upper, binary))
        self.binaries += binary * len(lower)
        self.count += len(lower)
        return np.arange(self.count - len(lower), self.count)

    def rows(self, terms: Sequence[Any], least: np.ndarray, most: Any = np.inf) -> None:
        """Rows least <= sum of terms <= most.

        Args:
          terms: matrices (r, m), over the first m columns, and pairs (places, factors) of one
            column for each row, (r,).
          least, most: (r,).
        """
        matrix = np.zeros((len(least), self.count))
        for term in terms:
            if isinstance(term, tuple):
                matrix[np.arange(len(least)), term[0]] += term[1]
            else:
                matrix[:, : term.shape[1]] += term
        self._rows.append((matrix, least, np.broadcast_to(most, least.shape)))

    def near(self, centre: np.ndarray, eps: float) -> None:
        """Keep the input within eps of a centre in L1: sum e <= eps for an e >= |x - centre|."""
        x, c = np.eye(centre.size), centre.ravel()
        e = self.columns(np.zeros_like(c), np.full_like(c, eps))
        self.rows([-x, (e, 1.0)], -c)
        self.rows([x, (e, 1.0)], c)
        total = np.zeros((1, self.count))
        total[0, e] = -1.0
        self.rows([total], np.array([-eps]))

    def relu(self, z: Affine) -> Affine:
        """max(z, 0). Where an end of z is not known, the result is only bounded from below."""
        active = z.lower >= 0
        unsure = ~active & ~(z.upper <= 0)
        low, high = z.lower[unsure], z.upper[unsure]
        known = np.isfinite(low) & np.isfinite(high)
        y = self.columns(np.zeros_like(high), np.where(known, high, np.inf))
        d = self.columns(np.zeros_like(high), np.ones_like(high), binary=True)
        x = z.columns[:, unsure].T
        c = z.offset[unsure]
        self.rows([-x, (y, 1.0)], c)
        x, c, y_, d, low, high = (a[known] for a in (x, c, y, d, low, high))
        self.rows([(d, high), (y_, -1.0)], np.zeros_like(high))
        self.rows([x, (y_, -1.0), (d, low)], low - c)
        found = z * active
        columns = found.wide(self.count).copy()
        columns[y, *np.nonzero(unsure)] = 1.0
        ends = (np.where(end <= 0, 0.0, end) for end in (z.lower, z.upper))
        return Affine(columns, found.offset, *ends)

    # max_j z_j over a group. Entries with u_j <= max_i l_i cannot exceed the one with that lower
    # end. If one entry is left, it is the maximum. Otherwise, with U_j = max over the others of u_i,
    #     y >= z_j,   y <= z_j + (U_j - l_j) (1 - d_j),   sum_j d_j = 1.

    def largest(self, z: Affine, axes: Sequence[int]) -> Affine:
        """The maximum of z along some axes; as for `relu` where an end is not known."""
        last = range(-len(axes), 0)
        values, l, u = (np.moveaxis(a, axes, last) for a in (z.offset, z.lower, z.upper))
        kept = values.shape[: values.ndim - len(axes)]
        l, u, offset = (a.reshape(math.prod(kept), -1) for a in (l, u, values))
        l, u = np.where(np.isnan(l), -np.inf, l), np.where(np.isnan(u), np.inf, u)
        matrix = np.moveaxis(z.columns, [a + 1 for a in axes], last).reshape(-1, *offset.shape)
        groups, first = np.arange(len(l)), np.argmax(l, 1)
        rivals = u > np.max(l, 1, keepdims=True)
        rivals[groups, first] = True
        several = np.sum(rivals, 1) > 1
        columns = np.where(several, 0.0, matrix[:, groups, first])
        result = np.where(several, 0.0, offset[groups, first])
        lower, upper = np.max(l, 1), np.max(np.where(rivals, u, -np.inf), 1)

        y = self.columns(lower[several], upper[several])
        of_group = np.zeros(len(l), int)
        of_group[several] = y
        g, j = np.nonzero(rivals & several[:, None])
        d = self.columns(np.zeros(len(g)), np.ones(len(g)), binary=True)
        x, c, owner = matrix[:, g, j].T, offset[g, j], of_group[g]
        self.rows([-x, (owner, 1.0)], c)
        others = np.where(rivals, u, -np.inf)[g]
        others[np.arange(len(g)), j] = -np.inf
        gap = np.max(others, 1, initial=-np.inf) - l[g, j]
        known = np.isfinite(gap)
        self.rows([x[known], (owner[known], -1.0), (d[known], -gap[known])], -gap[known] - c[known])
        one = np.zeros((len(y), self.count))
        one[np.searchsorted(y, owner), d] = 1.0
        self.rows([one], np.ones(len(y)), np.ones(len(y)))
        columns = Affine(columns, result, lower, upper).wide(self.count).copy()
        columns[y, several] = 1.0
        shaped = (a.reshape(kept) for a in (result, lower, upper))
        return Affine(columns.reshape(-1, *kept), *shaped)

    def least(self, matrix: np.ndarray, offset: np.ndarray, seconds: float) -> Solution:
        """Minimise the largest of some rows C y + d of the outputs y.

        Args:
          matrix: C, (r, k).
          offset: d, (r,).
          seconds: time limit.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        if seconds <= 0:
            return Solution(-np.inf, None, True)
        # Two columns more: t, and an idle binary, because SciPy returns no dual bound for programs
        # without integers.
        count = self.count + 2
        values = matrix @ self.output.wide(self.count).T
        goal = np.pad(-values, ((0, 0), (0, 2)))
        goal[:, -2] = 1.0
        blocks = [*self._rows, (goal, offset + matrix @ self.output.offset, np.inf + offset)]
        least, most = (np.concatenate([block[i] for block in blocks]) for i in (1, 2))
        lower, upper = (np.concatenate([ends[i] for ends in self._ends]) for i in (0, 1))
        whole = [np.full(len(ends[0]), ends[2]) for ends in self._ends]
        if not all(np.isfinite(block[0]).all() for block in blocks) or np.isnan(least).any():
            return Solution(-np.inf, None, False)
        found = milp(
            np.eye(count)[-2],
            integrality=np.concatenate([*whole, [False, True]]),
            bounds=Bounds(np.append(lower, [-np.inf, 0]), np.append(upper, [np.inf, 1])),
            constraints=LinearConstraint(
                vstack([csr_array(_widened(block[0], count)) for block in blocks]), least, most
            ),
            options={"mip_rel_gap": 0, "time_limit": seconds},
        )
        bound = found.mip_dual_bound if found.status in (0, 1) else None
        x = None if found.x is None else found.x[: self._inputs]
        lower = -np.inf if bound is None or not np.isfinite(bound) else float(bound)
        return Solution(lower, x, found.status == 1)
