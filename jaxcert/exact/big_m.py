"""The big-M encoding of piecewise linear models, solved by SciPy's HiGHS.

A value of the model is a linear function of a program's columns: the number 1, the inputs, and for
each kink two more, its result y and a binary d. Affine equations are followed exactly, so that what
they compute needs no columns. With l <= z <= u and l < 0 < u,

    y = max(z, 0)   iff   y >= 0,  y >= z,  y <= u d,  y <= z - l (1 - d)   for a d in {0, 1},

and the other elementwise functions are sums of such maxima:

    leaky(z) = a z + (1 - a) relu(z),     |z| = 2 relu(z) - z,
    max(z, c) = relu(z - c) + c,          min(z, c) = -max(-z, -c).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, sparse

from jaxcert.bounds.planes import is_affine
from jaxcert.bounds.products import exact_products
from jaxcert.bounds.walk import BoundHidden, Walk
from jaxcert.graph import Equation, Var, holds_all, read, unsupported
from jaxcert.model import as_float64
from jaxcert.sets import Box, L1Ball
from jaxcert.tracing import Traced

TOLERANCE = 1e-5  # how far above 0 a bound must be; HiGHS works to 1e-7


@dataclasses.dataclass(frozen=True)
class Linear:
    """Values sum_j parts[j] p_j of the first m columns p of a program, with p_0 = 1; parts are
    (m, *shape)."""

    parts: np.ndarray

    def wide(self, count: int) -> np.ndarray:
        """The parts of `count` columns, a copy."""
        more = count - len(self.parts)
        return np.pad(self.parts, [(0, more), *[(0, 0)] * (self.parts.ndim - 1)])

    @np.errstate(invalid="ignore")
    def mapped(self, matrix: np.ndarray, offset: np.ndarray) -> "Linear":
        """C z + d of these values z as one vector."""
        return Linear(self.parts.reshape(len(self.parts), -1) @ matrix.T) + offset

    def __getitem__(self, place: Any) -> "Linear":
        return Linear(self.parts[(slice(None), *np.index_exp[place])])

    def __add__(self, other: Any) -> "Linear":
        if isinstance(other, Linear):
            count = max(len(self.parts), len(other.parts))
            return Linear(self.wide(count) + other.wide(count))
        parts = self.parts.copy()
        parts[0] += other
        return Linear(parts)

    def __mul__(self, factor: Any) -> "Linear":
        return Linear(self.parts * factor)

    def __neg__(self) -> "Linear":
        return Linear(-self.parts)

    def __sub__(self, other: Any) -> "Linear":
        return self + -other


class Program:
    """Columns between ends and inequalities that describe a model on a set; `input` is the input.

    The first column is the number 1, and an integer: SciPy gives no dual bound of a program without
    integers. Ends that are not known (NaN) make numbers of the program NaN, and then nothing is
    solved. Ends that rounding has swapped are on one side of a kink.
    """

    def __init__(self, box: Box):
        self._columns: list[list[np.ndarray]] = []
        self._rows: list[Any] = []
        self._count = 0
        self._may_be_empty = False
        self.columns(1, 1.0, 1.0, whole=True)
        lower, upper = np.asarray(box.lower), np.asarray(box.upper)
        parts = self.columns(lower.size, lower.ravel(), upper.ravel()).parts
        self.input = Linear(parts.reshape(-1, *lower.shape))

    def columns(self, n: int, lower: Any, upper: Any, whole: bool = False) -> Linear:
        """New columns with these ends, (n,), integers or not."""
        self._columns.append([np.full(n, part) for part in (lower, upper, whole)])
        self._count += n
        return Linear(np.eye(self._count, n, n - self._count))

    def _all_columns(self) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in zip(*self._columns, strict=True)]

    def require(self, values: Linear) -> None:
        """Add the inequalities values >= 0, (r,)."""
        self._rows.append(sparse.csr_array(values.parts.T))

    def ends(self, z: Linear) -> tuple[np.ndarray, np.ndarray]:
        """The range of values over the ends of their columns."""
        lower, upper, _ = (a[: len(z.parts)] for a in self._all_columns())
        rising, falling = np.maximum(z.parts, 0), np.minimum(z.parts, 0)
        least = np.tensordot(lower, rising, 1) + np.tensordot(upper, falling, 1)
        return least, np.tensordot(upper, rising, 1) + np.tensordot(lower, falling, 1)

    def keep_near(self, centre: np.ndarray, eps: float) -> None:
        """The input is within eps of a centre in L1: sum_i e_i <= eps for an e >= |x - centre|."""
        x = Linear(self.input.parts.reshape(len(self.input.parts), -1)) - centre.ravel()
        e = self.columns(centre.size, 0.0, eps)
        self.require(e - x)
        self.require(e + x)
        self.require(-e.mapped(np.ones((1, centre.size)), np.array([-eps])))

    def keep_cut(self, matrix: np.ndarray, offset: np.ndarray) -> None:
        """The flat input satisfies matrix x + offset <= 0; then there may be none. Loosened by
        `TOLERANCE`, so that the solver's own does not make a set empty."""
        if len(offset):
            self._may_be_empty = True
            self.require(-self.input.mapped(matrix, offset - TOLERANCE))

    def relu(self, z: Linear, lower: np.ndarray, upper: np.ndarray) -> Linear:
        """max(z, 0) for z between two ends."""
        active = lower >= 0
        unsure = ~active & ~(upper <= 0)
        x, l, u = z[unsure], lower[unsure], upper[unsure]
        y, d = self.columns(len(u), 0.0, u), self.columns(len(u), 0.0, 1.0, whole=True)
        self.require(y - x)
        self.require(d * u - y)
        self.require(x - l + d * l - y)
        return self._replaced(z * active, unsure, y)

    # max_j z_j of a group: entries with u_j <= max_i l_i never exceed the one with that lower end.
    # If one entry is left, it is the maximum. Otherwise, with U_j the largest u_i of the others,
    #     y >= z_j,   y <= z_j + (U_j - l_j) (1 - d_j),   sum_j d_j >= 1   for some d_j in {0, 1}.

    def largest(self, z: Linear, lower: np.ndarray, upper: np.ndarray) -> Linear:
        """The maxima (g,) of the rows of z, (g, n), between two ends."""
        groups, first, least = np.arange(len(lower)), np.argmax(lower, 1), np.max(lower, 1)
        rivals = ~(upper <= least[:, None])
        rivals[groups, first] = True
        several = np.sum(rivals, 1) > 1
        top = np.where(rivals, upper, -np.inf)
        y = self.columns(several.sum(), least[several], np.max(top, 1)[several])
        group, entry = np.nonzero(rivals & several[:, None])
        owner = (np.cumsum(several) - 1)[group]
        others = top[group]
        others[np.arange(len(group)), entry] = -np.inf
        gap = np.max(others, 1) - lower[group, entry]
        d = self.columns(len(group), 0.0, 1.0, whole=True)
        x, mine = z[group, entry], y[owner]
        self.require(mine - x)
        self.require(x + gap - d * gap - mine)
        self.require(d.mapped(np.equal.outer(np.arange(several.sum()), owner), np.array(-1.0)))
        return self._replaced(z[groups, first], several, y)

    def _replaced(self, values: Linear, where: np.ndarray, new: Linear) -> Linear:
        """The values with others in some places."""
        parts = values.wide(self._count)
        parts[:, where] = new.wide(self._count)
        return Linear(parts)

    def least(self, rows: Linear, seconds: float) -> tuple[float, Any, bool]:
        """Minimise the largest of some values (r,): the solver's dual bound or -inf, the flat input
        at the best point or None, and whether the time ran out. The least value over nothing is
        inf."""
        goal = np.vstack([-rows.wide(self._count), np.ones(rows.parts.shape[1])])
        blocks = [*self._rows, sparse.csr_array(goal.T)]
        for some in blocks:
            some.resize(some.shape[0], len(goal))
        matrix: Any = sparse.vstack(blocks)
        lower, upper, whole = self._all_columns()
        if not all(np.isfinite(a).all() for a in (matrix.data, lower, upper)):
            return -np.inf, None, False
        found = optimize.milp(
            np.eye(len(goal))[-1],  # t comes last
            integrality=np.append(whole, False),
            bounds=optimize.Bounds(np.append(lower, -np.inf), np.append(upper, np.inf)),  # type: ignore
            constraints=optimize.LinearConstraint(matrix, 0, np.inf),
            options={"mip_rel_gap": 0, "time_limit": seconds},
        )
        if found.status == 2 and self._may_be_empty:
            return np.inf, None, False
        bound = found.mip_dual_bound if found.status in (0, 1) else None  # not if it failed
        bound = -np.inf if bound is None or not np.isfinite(bound) else float(bound)
        x = None if found.x is None else found.x[1 : 1 + len(self._columns[1][0])]
        return bound, x, found.status == 1


# --- Equations ------------------------------------------------------------------------------------


def encoded(traced: Traced, region: Any, bound: BoundHidden | None) -> tuple[Program, Linear]:
    """The program of a model on one set, and the model's outputs. Only inside `enable_x64`."""
    walk = Walk(*traced, region, True)
    if bound is not None:
        walk.run(bound)
    program = Program(walk.boxes[walk.net.input])
    if isinstance(region, L1Ball):
        program.keep_near(np.asarray(region.x), float(region.eps[0]))
    known: dict[Var, Any] = {walk.net.input: program.input}

    def value(atom: Any) -> Any:
        found = read(known, atom)
        return found if isinstance(found, Linear) else as_float64(jnp.asarray(found))

    for eqn in walk.net.graph.equations:
        values = [value(atom) for atom in eqn.inputs]
        rule = _kink if eqn.bounded and eqn.name in _KINKS else _affine
        known.update(zip(eqn.outputs, rule(program, walk, eqn, values), strict=True))
    outputs = value(walk.net.graph.outputs[0])
    return program, outputs if isinstance(outputs, Linear) else Linear(np.asarray(outputs)[None])


# With the number 1 among the columns, an affine equation is linear in its terms, the constant ones
# included, which are multiples of it: its result has as parts its values at their parts.

_PRODUCTS = {"dot_general": exact_products(True), "conv_general_dilated": exact_products(True)}
_FACTORS = {*_PRODUCTS, "mul", "div"}  # constants in these are factors


def _affine(program: Program, walk: Walk, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    if not any(isinstance(value, Linear) for value in values):
        return eqn.bind(*values)
    narrow = eqn.name.startswith("convert") and not holds_all(eqn.outputs[0].dtype, jnp.float32)
    if narrow or not is_affine(eqn) or eqn.name == "reduce_precision":
        hint = "use bounds.crown, or functions that are piecewise linear, in float32 or float64"
        raise unsupported(eqn, "the mixed-integer encoding", hint)
    if eqn.name == "convert_element_type":
        return list(values)
    values = values if eqn.name in _FACTORS else [_term(value) for value in values]
    axes = tuple(0 if isinstance(value, Linear) else None for value in values)
    count = max(len(value.parts) for value in values if isinstance(value, Linear))
    padded = -(-count // 64) * 64  # of few different sizes, as each is compiled anew
    parts = [value.wide(padded) if isinstance(value, Linear) else value for value in values]
    bind = functools.partial(eqn.bind, **_PRODUCTS.get(eqn.name, {}))
    found = jax.vmap(bind, axes)(*map(jnp.asarray, parts))
    return [Linear(np.asarray(out)[:count]) for out in found]


def _term(value: Any) -> Any:
    """A constant as a multiple of the number 1, but for indices and choices."""
    known = not isinstance(value, Linear) and jnp.issubdtype(value.dtype, jnp.floating)
    return Linear(np.asarray(value)[None]) if known else value


def _kink(program: Program, walk: Walk, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A function with a kink, of one operand that depends on the input."""
    (place,) = (i for i, value in enumerate(values) if isinstance(value, Linear))
    lower, upper = program.ends(values[place])
    box = walk.boxes.get(eqn.inputs[place], Box(lower, upper))  # type: ignore[arg-type]
    lower, upper = np.fmax(lower, box.lower), np.fmin(upper, box.upper)
    constants = [np.asarray(value) for i, value in enumerate(values) if i != place]
    return [_KINKS[eqn.name](program, eqn, values[place], lower, upper, *constants)]


def _max(program, eqn, z, l, u, c):
    return program.relu(z - c, l - c, u - c) + c


def _min(program, eqn, z, l, u, c):
    return -_max(program, eqn, -z, -u, -l, -c)


def _clamp(program, eqn, z, l, u, low, high):
    above = _max(program, eqn, z, l, u, low)
    return _min(program, eqn, above, np.maximum(l, low), np.maximum(u, low), high)


def _reduce_max(program, eqn, z, l, u):
    axes, shape = eqn.params["axes"], eqn.outputs[0].shape
    kept = [axis for axis in range(l.ndim) if axis not in axes]

    def grouped(a):  # (*l.shape) to (groups, entries)
        return a.transpose(*kept, *axes).reshape(math.prod(shape), -1)

    parts = np.stack([grouped(part) for part in z.parts])
    found = program.largest(Linear(parts), grouped(l), grouped(u))
    return Linear(found.parts.reshape(-1, *shape))


_KINKS: dict[str, Callable[..., Linear]] = {
    "relu": lambda program, eqn, z, l, u: program.relu(z, l, u),
    "leaky_relu": lambda program, eqn, z, l, u, a: z * a + program.relu(z, l, u) * (1 - a),
    "abs": lambda program, eqn, z, l, u: program.relu(z, l, u) * 2.0 - z,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "reduce_max": _reduce_max,
}
"""(program, equation, operand, its ends, constants) -> the result."""
