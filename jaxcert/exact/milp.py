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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.linear import Hidden, bounder, crown
from jaxcert.bounds.walk import BoundHidden
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question, question, rows_at
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, as_float64, is_traced, output_shape, split, uses_float64
from jaxcert.sets import Box, InputSet, L2Ball, checked, contains, project
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
    task = _Task.of(f, region, spec, hidden)
    status, reason, points = zip(*[_decided(task, i, clock) for i in range(task.n)], strict=True)
    example = None
    if Status.FALSIFIED in status:
        blank = np.zeros(task.model.shape)
        with jax.enable_x64(True):
            example = jnp.asarray(np.stack([blank if p is None else p for p in points]))
            example = example.astype(task.model.dtype)
    return Verdict(jnp.array(status, jnp.int32), jnp.array(reason, jnp.int32), example)


def _decided(task: "_Task", i: int, clock: "_Clock") -> tuple[Status, Reason, np.ndarray | None]:
    """The answer for example i, with a counterexample if there is one."""
    if clock.share(1) <= 0:
        return Status.UNKNOWN, Reason.TIME, None
    program, outputs = task.encoded(i)
    matrix, offset, clauses = (
        a[i] for a in (task.asked.matrix, task.asked.offset, task.asked.clauses)
    )
    reasons = set()
    for j, clause in enumerate(clauses):
        share = clock.share((task.n - i) * len(clauses) - j)
        found = program.least(outputs.mapped(matrix[clause], offset[clause]), share)
        if found.x is not None:
            point = task.rounded(i, task.inside(i, found.x))
            if task.breaks(i, point):
                return Status.FALSIFIED, Reason.NONE, point
        if not found.lower > TOLERANCE:
            reasons.add(Reason.TIME if found.out_of_time else Reason.NUMERICS)
    if not reasons:
        return Status.VERIFIED, Reason.NONE, None
    return Status.UNKNOWN, Reason.TIME if Reason.TIME in reasons else Reason.NUMERICS, None


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
    the upper one is attained, up to the rounding of float64. They meet unless time runs out.

    Arguments and errors as for `verify`, but for the spec, which is a plain `Spec`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x) - 0.5 * x
      >>> found = minimum(f, LinfBall(jnp.full((1, 1), 0.25), 1.0), Spec(jnp.eye(1), 2.0))
      >>> print(found.lower, found.upper, found.point)
      [[2.]] [[2.]] [[[0.]]]
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"minimum needs the rows of one Spec, got {type(spec).__name__}")
    clock = _Clock(seconds)
    task = _Task.of(f, region, spec, hidden)
    count = task.asked.matrix.shape[1]
    lower, upper = np.full((task.n, count), -np.inf), np.full((task.n, count), np.inf)
    point = np.full((task.n, count, *task.model.shape), np.nan)
    for i in range(task.n):
        if clock.share(1) <= 0:
            break
        program, outputs = task.encoded(i)
        rows = outputs.mapped(task.asked.matrix[i], task.asked.offset[i])
        for j in range(count):
            found = program.least(rows[j : j + 1], clock.share((task.n - i) * count - j))
            lower[i, j] = found.lower
            if found.x is not None:
                point[i, j] = task.inside(i, found.x)
                upper[i, j] = task.rows(i, point[i, j])[j]
    return Minimum(lower, upper, point)


class _Clock:
    """What is left of a time limit."""

    def __init__(self, seconds: float):
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        self._end = time.monotonic() + seconds

    def share(self, parts: int) -> float:
        """An equal share of the seconds left, 0 if there are none."""
        return max(0.0, self._end - time.monotonic()) / parts


# --- A question about a model ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A question about a model on n sets, in float64.

    Attributes:
      model, arrays: the model.
      traced: its graph at a batch of one.
      asked: the question.
      hidden: how hidden values are bounded.
    """

    model: Traceable
    arrays: Any
    traced: Traced
    asked: Question
    hidden: Hidden | None

    @classmethod
    def of(cls, f: Model, region: InputSet, prop: Property, hidden: Hidden | None) -> "_Task":
        """The task, with everything checked that can be."""
        arrays, structure = split(f)
        if is_traced(arrays, region, prop):
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
            asked = question(as_float64(region), prop, len(x), k)
            return cls(model, arrays, model.trace(arrays, 1), asked, hidden)

    @property
    def n(self) -> int:
        """How many sets there are."""
        return len(self.asked.matrix)

    def set(self, i: int) -> InputSet:
        """Set i as a batch of one."""
        return _part(self.asked.region, i)

    def encoded(self, i: int) -> "tuple[Program, Affine]":
        """The model on set i."""
        if isinstance(self.hidden, tuple | list):
            bound = bounder([jax.tree.map(lambda end: end[i : i + 1], b) for b in self.hidden])
        else:
            # All rows at once: a loop over chunks of them would be compiled anew for each example.
            bound = bounder(crown if self.hidden is None else self.hidden, chunk=1 << 20)
        with jax.enable_x64(True):
            return encoded(self.traced, self.set(i), bound)

    def inside(self, i: int, x: np.ndarray) -> np.ndarray:
        """The point of set i nearest to x."""
        with jax.enable_x64(True):
            return np.asarray(project(self.set(i), jnp.asarray(x).reshape(1, *self.model.shape))[0])

    def rounded(self, i: int, point: np.ndarray) -> np.ndarray:
        """A point of set i in the input's type, rounded towards the centre, where the set goes on."""
        with jax.enable_x64(True):
            region = self.set(i)
            ball = not isinstance(region, Box)
            centre = np.asarray(region.x if ball else region.lower / 2 + region.upper / 2)[0]
        near = point.astype(self.model.dtype)
        beyond = np.abs(near.astype(np.float64) - centre) > np.abs(point - centre)
        back = np.nextafter(near, centre.astype(self.model.dtype))
        return np.where(beyond, back, near).astype(np.float64)

    def breaks(self, i: int, point: np.ndarray) -> bool:
        """Whether a point lies in set i and the model breaks the property there, replayed in the
        caller's arithmetic and in float64."""
        with jax.enable_x64(True):
            x = jnp.asarray(point)[None]
            broken, _ = self.model.tried(self.arrays, self.asked, x, np.array([i]))
            return bool(broken[0] & contains(self.set(i), x)[0])

    def rows(self, i: int, point: np.ndarray) -> np.ndarray:
        """The rows (s,) of question i at a point, in float64."""
        with jax.enable_x64(True):
            outputs = self.model.structure.build(as_float64(self.arrays))(jnp.asarray(point)[None])
            return np.asarray(rows_at(self.asked, outputs.astype(jnp.float64), np.array([i]))[0])


def _part(region: InputSet, i: int) -> Any:
    if isinstance(region, Box):
        return Box(region.lower[i : i + 1], region.upper[i : i + 1])
    valid = region.valid
    if valid is not None:
        valid = _part(
            Box(*[jnp.broadcast_to(v, region.x.shape) for v in (valid.lower, valid.upper)]), i
        )
    eps = jnp.broadcast_to(region.eps, region.x.shape[:1])
    return type(region)(region.x[i : i + 1], eps[i : i + 1], valid)


# --- Values of the model, and the program around them ---------------------------------------------


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
        """The coefficients of `count` columns, a copy."""
        return np.pad(self.columns, [(0, count - len(self.columns)), *[(0, 0)] * self.offset.ndim])

    def within(self, box: Any) -> "Affine":
        """The same values, known to lie in a box, whose ends rounding may have swapped."""
        ends = np.asarray(box.lower), np.asarray(box.upper)
        return dataclasses.replace(self, lower=np.minimum(*ends), upper=np.maximum(*ends))

    def mapped(self, matrix: np.ndarray, offset: np.ndarray) -> "Affine":
        """C z + d of these values as a vector, (r,), with ends unknown."""
        columns = self.columns.reshape(len(self.columns), -1) @ matrix.T
        unknown = np.full(len(offset), np.nan)
        return Affine(columns, matrix @ self.offset.ravel() + offset, unknown, unknown)

    def __getitem__(self, place: Any) -> "Affine":
        parts = (a[place] for a in (self.offset, self.lower, self.upper))
        return Affine(self.columns[:, place], *parts)

    def __add__(self, other: Any) -> "Affine":
        if not isinstance(other, Affine):
            parts = (a + np.asarray(other) for a in (self.offset, self.lower, self.upper))
            return Affine(self.columns, *parts)
        count = max(len(self.columns), len(other.columns))
        ends = self.lower + other.lower, self.upper + other.upper
        return Affine(self.wide(count) + other.wide(count), self.offset + other.offset, *ends)

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
    """Columns between ends, and linear inequalities, that describe a model on a set.

    Attributes:
      input: the model's input.
      count: how many columns there are.
    """

    def __init__(self, box: Box):
        self._lower, self._upper, self._whole = [], [], []
        self._matrices, self._least, self._most = [], [], []
        self.count = 0
        lower, upper = np.asarray(box.lower), np.asarray(box.upper)
        self.columns(lower.ravel(), upper.ravel())
        unit = np.eye(lower.size).reshape(-1, *lower.shape)
        self.input = Affine(unit, np.zeros(lower.shape), lower, upper)

    def columns(self, lower: np.ndarray, upper: np.ndarray, binary: bool = False) -> np.ndarray:
        """The places (n,) of new columns with these ends."""
        start, self.count = self.count, self.count + len(lower)
        self._lower.append(lower)
        self._upper.append(upper)
        self._whole.append(np.full(len(lower), binary))
        return np.arange(start, self.count)

    def binaries(self, n: int) -> np.ndarray:
        """The places (n,) of new columns that are 0 or 1."""
        return self.columns(np.zeros(n), np.ones(n), binary=True)

    def rows(self, *terms: Any, least: np.ndarray, most: float = np.inf) -> None:
        """The inequalities least <= sum of the terms <= most.

        Args:
          *terms: matrices (r, m) over the first m columns, and pairs (places, factor) of one column
            for each row.
          least, most: (r,) and a number.
        """
        from scipy.sparse import csr_array

        matrix = np.zeros((len(least), self.count))
        for term in terms:
            if isinstance(term, tuple):
                matrix[np.arange(len(least)), term[0]] += term[1]
            else:
                matrix[:, : term.shape[1]] += term
        self._matrices.append(csr_array(matrix))
        self._least.append(least)
        self._most.append(np.full(len(least), most))

    def keep_near(self, centre: np.ndarray, eps: float) -> None:
        """The input is within eps of a centre in L1: sum_i e_i <= eps for some e >= |x - centre|."""
        c, unit = centre.ravel(), np.eye(centre.size)
        e = self.columns(np.zeros(c.size), np.full(c.size, eps))
        self.rows(-unit, (e, 1.0), least=-c)
        self.rows(unit, (e, 1.0), least=c)
        total = np.zeros((1, self.count))
        total[:, e] = 1.0
        self.rows(total, least=np.zeros(1), most=eps)

    def relu(self, z: Affine) -> Affine:
        """max(z, 0). Where an end of z is not known, the result is only bounded from below."""
        active = z.lower >= 0
        unsure = ~active & ~(z.upper <= 0)
        some = z[unsure]
        known = np.isfinite(some.lower) & np.isfinite(some.upper)
        y = self.columns(np.zeros(known.size), np.where(known, some.upper, np.inf))
        d = self.binaries(known.size)
        self.rows(-some.columns.T, (y, 1.0), least=some.offset)
        some, below, on = some[known], y[known], d[known]
        self.rows((on, some.upper), (below, -1.0), least=np.zeros(len(below)))
        least = some.lower - some.offset
        self.rows(some.columns.T, (below, -1.0), (on, some.lower), least=least)
        found = Affine(
            np.where(active, z.columns, 0), np.where(active, z.offset, 0), z.lower, z.upper
        )
        columns = found.wide(self.count)
        columns[y, *np.nonzero(unsure)] = 1.0
        ends = (np.where(end <= 0, 0.0, end) for end in (z.lower, z.upper))
        return Affine(columns, found.offset, *ends)

    # max_j z_j of a group: entries with u_j <= max_i l_i never exceed the one with that lower end.
    # If one entry is left, it is the maximum. Otherwise, with U_j the largest u_i of the others,
    #     y >= z_j,   y <= z_j + (U_j - l_j) (1 - d_j),   sum_j d_j = 1   for some d_j in {0, 1}.

    def largest(self, z: Affine) -> Affine:
        """The maxima (g,) of the rows of z, (g, n); as for `relu` where an end is not known."""
        l, u = (
            np.where(np.isnan(z.lower), -np.inf, z.lower),
            np.where(np.isnan(z.upper), np.inf, z.upper),
        )
        group, first = np.arange(len(l)), np.argmax(l, 1)
        rivals = u > np.max(l, 1, keepdims=True)
        rivals[group, first] = True
        several = np.sum(rivals, 1) > 1
        top = np.where(rivals, u, -np.inf)
        y = np.zeros(len(l), int)
        y[several] = self.columns(np.max(l, 1)[several], np.max(top, 1)[several])
        g, j = np.nonzero(rivals & several[:, None])
        d, some = self.binaries(len(g)), z[g, j]
        self.rows(-some.columns.T, (y[g], 1.0), least=some.offset)
        others = top[g]
        others[np.arange(len(g)), j] = -np.inf
        gap = np.max(others, 1) - l[g, j]
        known = np.isfinite(gap)
        some, below, on, gap = some[known], y[g][known], d[known], gap[known]
        self.rows(some.columns.T, (below, -1.0), (on, -gap), least=-gap - some.offset)
        one = np.zeros((len(l), self.count))
        one[g, d] = 1.0
        self.rows(one[several], least=np.ones(np.sum(several)), most=1.0)
        single = z[group, first]
        columns = np.where(several, 0.0, single.wide(self.count))
        columns[y[several], several] = 1.0
        offset = np.where(several, 0.0, single.offset)
        return Affine(columns, offset, np.max(z.lower, 1), np.max(z.upper, 1))

    def least(self, rows: Affine, seconds: float) -> Solution:
        """Minimise the largest of some values, (r,), within a time limit."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        if seconds <= 0:
            return Solution(-np.inf, None, True)
        # Two columns more: t, and an idle binary, because SciPy gives no dual bound of a program
        # without integers.
        count = self.count + 2
        goal = np.concatenate([-rows.wide(self.count).T, np.ones((len(rows.offset), 1))], 1)
        matrices = [*self._matrices, csr_array(goal)]
        for matrix in matrices:
            matrix.resize(matrix.shape[0], count)
        least = np.concatenate([*self._least, rows.offset])
        most = np.concatenate([*self._most, np.full(len(rows.offset), np.inf)])
        matrix = vstack(matrices)
        if not (np.isfinite(matrix.data).all() and np.isfinite(least).all()):
            return Solution(-np.inf, None, False)
        found = milp(
            np.eye(count)[-2],
            integrality=np.concatenate([*self._whole, [False, True]]),
            bounds=Bounds(
                np.concatenate([*self._lower, [-np.inf, 0]]),
                np.concatenate([*self._upper, [np.inf, 1]]),
            ),
            constraints=LinearConstraint(matrix, least, most),
            options={"mip_rel_gap": 0, "time_limit": seconds},
        )
        # An infeasible or failed program has bounds, too, which mean nothing.
        bound = found.mip_dual_bound if found.status in (0, 1) else None
        lower = float(bound) if bound is not None and np.isfinite(bound) else -np.inf
        x = None if found.x is None else found.x[: len(self._lower[0])]
        return Solution(lower, x, found.status == 1)


# --- Equations ------------------------------------------------------------------------------------


def encoded(
    traced: Traced, region: InputSet, bound_hidden: BoundHidden | None
) -> tuple[Program, Affine]:
    """The program of a model on one set, and the model's outputs. Only inside `enable_x64`."""
    walk = Walk(*traced, region, True)
    graph = walk.expanded.graph
    for eqn in graph.equations:
        _require_piecewise_linear(eqn)
    walk.run(bound_hidden)
    program = Program(walk.boxes[walk.net.input])
    if isinstance(region, L1Ball):
        program.keep_near(np.asarray(region.x), float(region.eps[0]))
    known: dict[Var, Any] = {walk.net.input: program.input}
    for eqn in graph.equations:
        values = [_value(known, atom) for atom in eqn.inputs]
        if eqn.name in _KINKS and eqn.bounded:
            results = [_KINKS[eqn.name](program, eqn, *values)]
        else:
            results = _affine(eqn, values)
        for out, result in zip(eqn.outputs, results, strict=True):
            known[out] = result.within(walk.boxes[out]) if out.bounded else result
    outputs = _value(known, graph.outputs[0])
    if not isinstance(outputs, Affine):
        outputs = np.asarray(outputs)
        outputs = Affine(np.zeros((0, *outputs.shape)), outputs, outputs, outputs)
    return program, outputs


def _value(known: dict[Var, Any], atom: Any) -> Any:
    value = read(known, atom)
    return value if isinstance(value, Affine) else as_float64(jnp.asarray(value))


_CASTS = frozenset("convert_element_type stop_gradient copy".split())


def _require_piecewise_linear(eqn: Equation) -> None:
    if not eqn.bounded or eqn.name in _KINKS:
        return
    known = is_affine(eqn) and eqn.name != "reduce_precision"
    if eqn.name == "convert_element_type":
        known = known and holds_all(eqn.outputs[0].dtype, jnp.float32)
    if not known:
        raise unsupported(
            eqn,
            "the mixed-integer encoding",
            "it takes affine equations, relu, leaky_relu, abs, max, min, clamp and pooling by max, "
            "in float32 or wider; use bounds.crown, which takes more",
        )


def _affine(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """An affine equation: its value at the offsets, its derivative along each column."""
    places = [i for i, value in enumerate(values) if isinstance(value, Affine)]
    if not places:
        return eqn.bind(*values)
    given: list[Affine] = [values[i] for i in places]
    if eqn.name in _CASTS:
        return given
    options = exact_products(True) if eqn.name in ("dot_general", "conv_general_dilated") else {}

    def f(*xs: Any) -> list[Any]:
        operands = list(values)
        for i, x in zip(places, xs, strict=True):
            operands[i] = x
        return eqn.bind(*operands, **options)

    offsets, slope = jax.linearize(f, *[jnp.asarray(z.offset) for z in given])
    # Of few different numbers of columns, each of which would compile anew.
    count = max(len(z.columns) for z in given)
    columns = jax.vmap(slope)(*[jnp.asarray(z.wide(-(-count // 64) * 64)) for z in given])
    unknown = (np.full(offset.shape, np.nan) for offset in offsets)
    return [
        Affine(np.asarray(c)[:count], np.asarray(o), nan, nan)
        for c, o, nan in zip(columns, offsets, unknown, strict=True)
    ]


def _max(program: Program, eqn: Equation, *operands: Any) -> Affine:
    z, c = operands if isinstance(operands[0], Affine) else operands[::-1]
    return program.relu(z - c) + c


def _min(program: Program, eqn: Equation, *operands: Any) -> Affine:
    return -_max(program, eqn, *[-each for each in operands])


def _clamp(program: Program, eqn: Equation, low: Any, z: Affine, high: Any) -> Affine:
    return _min(program, eqn, _max(program, eqn, z, low), high)


def _reduce_max(program: Program, eqn: Equation, z: Affine) -> Affine:
    axes, shape = eqn.params["axes"], eqn.outputs[0].shape
    last = range(-len(axes), 0)

    def by_group(a: np.ndarray, lead: int) -> np.ndarray:
        moved = np.moveaxis(a, [axis + lead for axis in axes], last)
        return moved.reshape(*a.shape[:lead], math.prod(shape), -1)

    parts = (by_group(a, 0) for a in (z.offset, z.lower, z.upper))
    found = program.largest(Affine(by_group(z.columns, 1), *parts))
    parts = (a.reshape(shape) for a in (found.offset, found.lower, found.upper))
    return Affine(found.columns.reshape(-1, *shape), *parts)


_KINKS: dict[str, Callable[..., Affine]] = {
    "relu": lambda program, eqn, z: program.relu(z),
    "leaky_relu": lambda program, eqn, z, a: z * a + program.relu(z) * (1 - a),
    "abs": lambda program, eqn, z: program.relu(z) * 2.0 - z,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "reduce_max": _reduce_max,
}
"""Functions with kinks, of one operand that depends on the input, by the program's own columns."""
