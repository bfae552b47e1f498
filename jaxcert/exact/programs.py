"""Convex programs of leaves: the least value of the largest of some rows over a set.

    minimise t + p s    where t >= slopes x + levels,  held x - room <= s,  s >= 0,  x in the set.

What is held may contradict itself, so it may be left at a price p, which bounds the multipliers.
Boxes and L1 balls make this a linear program (HiGHS), L2 balls one for an interior-point method.
Nothing is proved here: what comes back is rounded and only nearly optimal.
"""

import dataclasses
import time
from typing import Any

import numpy as np

_PRICE = 1e4  # of leaving a constraint, in units of the objective's change over the set


@dataclasses.dataclass(frozen=True)
class Program:
    """Rows and constraints of d inputs, in float64.

    Attributes:
      slopes, levels: the rows, (r, d) and (r,).
      held, room: held x <= room, (h, d) and (h,).
      low, high: a box, (d,).
      centre, eps, norm: the ball that x lies in as well; the norm is infinite if there is none.
    """

    slopes: np.ndarray
    levels: np.ndarray
    held: np.ndarray
    room: np.ndarray
    low: np.ndarray
    high: np.ndarray
    centre: Any = 0.0
    eps: float = 0.0
    norm: float = float("inf")

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self)[:-1])
        return all(bool(np.all(np.isfinite(part))) for part in parts)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Weights of rows (r,), multipliers of what is held (h,), both at least 0, and x (d,)."""

    weights: np.ndarray
    multipliers: np.ndarray
    x: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return bool(np.isfinite([*self.weights, *self.multipliers, *self.x]).all())


def solved(program: Program, seconds: float) -> Solution | None:
    """A nearly optimal solution, or None if none was found in that time."""
    if not program.finite or seconds <= 0:
        return None
    method = _interior if program.norm == 2.0 else _simplex
    found = method(program, seconds)
    return found if found is not None and found.finite else None


# --- Linear programs ------------------------------------------------------------------------------


def _simplex(program: Program, seconds: float) -> Solution | None:
    """By HiGHS; columns are x, t and s, and for L1 balls e >= |x - centre| with sum e <= eps."""
    from scipy.optimize import linprog

    (r, d), h = program.slopes.shape, len(program.held)
    price = _PRICE * max(1.0, np.abs(program.slopes).max(initial=0.0))
    goal = np.concatenate([np.zeros(d), [1.0, price]])
    bounds = [*zip(program.low, program.high, strict=True), (None, None), (0, None)]
    matrix, ends = _inequalities(program)
    if program.norm == 1.0:
        matrix, ends = _with_l1_ball(program, matrix, ends)
        goal, bounds = np.append(goal, np.zeros(d)), bounds + [(0, None)] * d
    options = {"time_limit": seconds}
    answer = linprog(goal, matrix, ends, bounds=bounds, method="highs", options=options)
    if answer.status != 0:
        return None
    duals = np.maximum(-answer.ineqlin.marginals, 0.0)
    return Solution(duals[:r], duals[r : r + h], np.clip(answer.x[:d], program.low, program.high))


def _inequalities(program: Program) -> tuple[Any, np.ndarray]:
    """The rows and what is held, as inequalities of the columns x, t and s."""
    from scipy.sparse import csr_array

    of_rows, of_held = -np.ones((len(program.levels), 1)), -np.ones((len(program.room), 1))
    matrix = np.block(
        [[program.slopes, of_rows, 0 * of_rows], [program.held, 0 * of_held, of_held]]
    )
    return csr_array(matrix), np.concatenate([-program.levels, program.room])


def _with_l1_ball(program: Program, matrix: Any, ends: np.ndarray) -> tuple[Any, np.ndarray]:
    """The inequalities with those of an L1 ball, in columns x, t, s and e."""
    from scipy.sparse import block_array, csr_array, eye_array

    d = len(program.low)
    one, none = eye_array(d), csr_array((d, 2))
    wide = block_array(
        [
            [matrix, csr_array((len(ends), d))],
            [block_array([[one, none]]), -one],
            [block_array([[-one, none]]), -one],
            [csr_array((1, d + 2)), np.ones((1, d))],
        ],
        format="csr",
    )
    return wide, np.concatenate([ends, program.centre, -program.centre, [program.eps]])


# --- Over L2 balls --------------------------------------------------------------------------------
#
# The primal-dual interior-point method of Boyd and Vandenberghe, "Convex Optimization", section
# 11.7: Newton's method on the conditions of optimality, where multipliers times slacks are a number
# that tends to 0. Points stay inside. The unit of length is the ball's radius, that of the
# objective the most that a row changes over a radius.


_GAP = 1e-10  # between the objective and its bound, in the objective's units
_STEPS = 100


@np.errstate(all="ignore")
def _interior(program: Program, seconds: float) -> Solution | None:
    """By an interior-point method; whatever it has reached when it gets no further."""
    end = time.perf_counter() + seconds
    scaled = _Scaled.of(program)
    if scaled is None:
        return None
    z = scaled.start()
    y = 1 / scaled.slacks(z)
    for _ in range(_STEPS):
        if time.perf_counter() > end:
            return None
        gap = float(y @ scaled.slacks(z))
        if gap < _GAP and np.linalg.norm(scaled.residual(z, y, 0.0)) < _GAP:
            break
        centre = 0.1 * gap / len(y)
        newton = scaled.newton(z, y, centre)
        moved = None if newton is None else scaled.moved(z, y, *newton, centre)
        if moved is None:
            break
        z, y = moved
    return scaled.solution(program, z, y)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """matrix z <= ends, low <= v <= high and |v| <= 1 for z = (v, t, s) with v = (x - centre) / eps
    where the box is wide; elsewhere x is the centre's."""

    matrix: np.ndarray
    ends: np.ndarray
    low: np.ndarray
    high: np.ndarray
    wide: np.ndarray
    units: np.ndarray  # of rows and of what is held, which each is divided by

    @classmethod
    def of(cls, program: Program) -> "_Scaled | None":
        """The program in its own units; None where there is nothing to choose."""
        eps, centre = program.eps, program.centre
        if eps <= 0:
            return None
        low, high = (program.low - centre) / eps, (program.high - centre) / eps
        wide = high - low > 1e-9
        if not wide.any():
            return None
        slopes, held = program.slopes[:, wide] * eps, program.held[:, wide] * eps
        size = np.full(len(slopes), np.linalg.norm(slopes, axis=1).max())
        sizes = np.concatenate([size, np.linalg.norm(held, axis=1)])
        units = np.where(sizes > 0, sizes, 1.0)
        levels = program.levels + program.slopes @ centre
        levels = levels - levels.max()  # t is what rows are above the largest
        room = program.room - program.held @ centre
        moved = dataclasses.replace(program, slopes=slopes, levels=levels, held=held, room=room)
        matrix, ends = _inequalities(moved)
        matrix = matrix.toarray()
        matrix[:, :-2] /= units[:, None]
        matrix = np.append(matrix, np.zeros((1, matrix.shape[1])), 0)
        matrix[-1, -1] = -1.0  # s >= 0
        return cls(matrix, np.append(ends / units, 0.0), low[wide], high[wide], wide, units)

    def start(self) -> np.ndarray:
        """A point inside: towards the middle of the box, not far from the centre."""
        middle = self.low / 2 + self.high / 2
        v = middle * min(1.0, 0.5 / max(float(np.linalg.norm(middle)), 1e-100))
        short = self.matrix[:, :-2] @ v - self.ends
        of_rows = self.matrix[:, -2] < 0
        most = np.array([short[of_rows].max(), short[~of_rows].max()])
        return np.concatenate([v, most + np.maximum(1.0, 1e-3 * np.abs(most))])

    def slacks(self, z: np.ndarray) -> np.ndarray:
        """Of the inequalities, of both ends of the box, and of the ball."""
        v = z[:-2]
        parts = self.ends - self.matrix @ z, v - self.low, self.high - v, [1 - v @ v]
        return np.concatenate(parts)

    def pulled(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The objective's gradient plus those of the constraints, each times its multiplier."""
        of_rows, left, right, ball = self.split(y)
        slope = self.matrix.T @ of_rows
        slope[:-2] += right - left + 2 * ball * z[:-2]
        slope[-2:] += [1.0, _PRICE]
        return slope

    def split(self, y: np.ndarray) -> list[np.ndarray]:
        """Numbers of all constraints by kind."""
        d = len(self.low)
        return np.split(y, np.cumsum([len(self.ends), d, d]))

    def residual(self, z: np.ndarray, y: np.ndarray, centre: float) -> np.ndarray:
        """What is 0 at the solution for this product of multipliers and slacks."""
        return np.concatenate([self.pulled(z, y), y * self.slacks(z) - centre])

    def newton(
        self, z: np.ndarray, y: np.ndarray, centre: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Newton's step of the point and of the multipliers, if it is finite.

        With D diagonal and rows V, (diag(D, 0, 0) + V' V) p = -g, so that with w = V p,
        p_v = -(g_v + V_v' w) / D and V_u' w = -g_u: as many unknowns as there are inequalities.
        """
        v, a = z[:-2], self.slacks(z)
        slope = self.pulled(z, centre / a)
        weights, left, right, ball = self.split(y / a)
        root = np.sqrt(left + right + 2 * y[-1])
        rows = np.concatenate([self.matrix, np.append(2 * v, [0, 0])[None]])
        rows = rows * np.sqrt(np.concatenate([weights, ball]))[:, None]
        of_v, of_u, g = rows[:, :-2] / root, rows[:, -2:], slope[:-2] / root
        # I + V_v V_v' / D by the QR factors of its root: its entries are too far apart.
        stacked, given = np.concatenate([of_v.T, np.eye(len(rows))]), [of_u, of_v @ g]
        if not (np.isfinite(stacked).all() and all(np.isfinite(part).all() for part in given)):
            return None
        factor = np.asarray(np.linalg.qr(stacked, mode="r"))
        both = np.linalg.solve(factor.T, np.column_stack(given))
        square, left_over = both[:, :2].T @ both[:, :2], both[:, :2].T @ both[:, 2] - slope[-2:]
        step_u = np.linalg.lstsq(square, left_over)[0]
        w = np.linalg.solve(factor, both[:, :2] @ step_u - both[:, 2])
        step = np.append(-(g + of_v.T @ w) / root, step_u)
        nearer = np.concatenate([self.matrix @ step, -step[:-2], step[:-2], [2 * v @ step[:-2]]])
        change = (centre + y * nearer) / a - y
        return (step, change) if np.isfinite([*step, *change]).all() else None

    def moved(
        self, z: np.ndarray, y: np.ndarray, step: np.ndarray, change: np.ndarray, centre: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Point and multipliers further along, inside and with a smaller residual, if there are
        such."""
        falls = change < 0
        share = min(1.0, 0.99 * float(np.min(-y[falls] / change[falls], initial=np.inf)))
        before = np.linalg.norm(self.residual(z, y, centre))
        while share > 1e-6:
            new = z + share * step, y + share * change
            inside = self.slacks(new[0]).min() > 0 and new[1].min() > 0
            after = np.linalg.norm(self.residual(*new, centre)) if inside else np.inf
            if after <= (1 - 0.01 * share) * before:
                return new
            share /= 2
        return None

    def solution(self, program: Program, z: np.ndarray, y: np.ndarray) -> Solution:
        """The point and its multipliers in the program's own units."""
        r = len(program.levels)
        duals = self.split(y)[0][:-1]
        x = np.array(program.centre, np.float64)
        x[self.wide] += program.eps * z[:-2]
        return Solution(duals[:r], duals[r:] * self.units[0] / self.units[r:], x)
