"""Piecewise linear models as mixed-integer programs, solved by SciPy's HiGHS.

The least value of a row over a set, up to the solver's tolerances (Tjeng, Xiao, Tedrake,
"Evaluating robustness of neural networks with mixed integer programming", ICLR 2019), for small
models: up to some hundreds of hidden values of unsure sign.

A clause is broken where the largest of its rows, t, is at most 0: t >= row_i for each, minimised.
The model is encoded by `big_m.py`; cuts of the set are inequalities of the program.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.linear import Hidden, bounder, crown
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact.big_m import TOLERANCE, Linear, Program, encoded
from jaxcert.exact.model import Traceable, placed, posed, surely_in
from jaxcert.exact.question import Question
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, is_traced
from jaxcert.sets import AnySet, Box, L2Ball, project
from jaxcert.specs import Property, Spec
from jaxcert.tracing import Traced


def verify(
    f: Model,
    region: AnySet,
    spec: Property,
    *,
    seconds: float = 60.0,
    hidden: Hidden | None = None,
) -> Verdict:
    """Decide for each set whether the property holds on all of it, by a program for each clause.

    VERIFIED: the solver's dual bound of every clause is above `TOLERANCE`, or it finds that the set
    is empty by that much. This holds up to HiGHS's own tolerance of 1e-7 and is no proof with
    rounding counted. FALSIFIED: the model breaks the property at a point of the set in the input's
    own type, in the caller's arithmetic and float64.

    Args:
      f: the model, (b, *input) -> (b, k), rows independent: affine equations, relu, leaky_relu,
        abs, max, min, clamp, reductions and pooling by max or min. Casts to float32 count as exact.
      region: a `Box`, `LinfBall`, `L1Ball` or `Polytope` of b sets.
      spec: a `Spec`, or `AllOf` and `AnyOf` of them, with `>` strict.
      seconds: for the whole call; each program has an equal share of what is left.
      hidden: `crown` (the default), `ibp`, or boxes from `hidden_bounds(f, outward=True)`: how
        hidden values are bounded. The time depends on it, the answer does not.

    Returns:
      A `Verdict`. UNKNOWN for TIME, or for NUMERICS: the least value is within `TOLERANCE` of 0, or
      the solver failed.

    Raises:
      ValueError, TypeError: an `L2Ball`, wrong shapes or dtypes, a call under jit.
      UnsupportedEquation, MixedRows: an equation is not piecewise linear, or casts to less than
        float32; an example's output depends on other examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> ball = LinfBall(jnp.array([[0.2], [0.6]]), 0.5)
      >>> verdict = verify(lambda x: jnp.abs(x - 0.1), ball, Spec(jnp.eye(1), -0.05))
      >>> print(verdict.status, abs(verdict.counterexample[0] - 0.1) < 0.05)
      [2 2] [ True]
    """
    task = _Task.of(f, region, spec, seconds, hidden)
    answers = [_decided(task, i) for i in range(task.n)]
    status, reason = (jnp.array([a[j] for a in answers], jnp.int32) for j in (0, 1))
    return Verdict(status, reason, jnp.asarray(np.stack([a[2] for a in answers])))


def _decided(task: "_Task", i: int) -> tuple[Status, Reason, np.ndarray]:
    """The answer for set i, with a counterexample if there is one."""
    blank, reasons = np.zeros(task.model.shape, task.model.dtype), set()
    if task.seconds() <= 0:
        return Status.UNKNOWN, Reason.TIME, blank
    program, outputs = task.encoded(i)
    clauses = task.asked.clauses[i]
    for j, clause in enumerate(clauses):
        rows = outputs.mapped(task.asked.matrix[i, clause], task.asked.offset[i, clause])
        share = task.seconds((task.n - i) * len(clauses) - j)
        bound, x, out_of_time = program.least(rows, share)
        point, worst = (blank, np.inf) if x is None else task.tried(i, x, clauses)
        if worst <= 0:
            return Status.FALSIFIED, Reason.NONE, point
        if not bound > TOLERANCE:
            reasons.add(Reason.TIME if out_of_time else Reason.NUMERICS)
    if reasons:
        return Status.UNKNOWN, min(reasons), blank  # TIME comes first
    return Status.VERIFIED, Reason.NONE, blank


def minimum(
    f: Model, region: AnySet, spec: Spec, *, seconds: float = 60.0, hidden: Hidden | None = None
) -> Box:
    """Find the least value of each row of C f(x) + d over the set, between two bounds.

    The lower one holds up to HiGHS's tolerance of 1e-7, so it is no proof with rounding counted.
    The upper one is attained at a point of the set in the input's own type, in the caller's
    arithmetic or in float64, whichever is larger. They meet up to rounding unless time runs out.

    Arguments and errors as for `verify`, but the spec is a plain `Spec`. Returns a `Box` (b, s) of
    numpy's float64; an end that was not found is infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x) - 0.5 * x
      >>> box = minimum(f, LinfBall(jnp.full((1, 1), 0.25), 1.0), Spec(jnp.eye(1), 2.0))
      >>> print(box.lower, box.upper)
      [[2.]] [[2.]]
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"minimum needs the rows of one Spec, got {type(spec).__name__}")
    task = _Task.of(f, region, spec, seconds, hidden)
    shape = task.asked.offset.shape
    lower, upper = np.full(shape, -np.inf), np.full(shape, np.inf)
    for i, j in np.ndindex(shape):
        if task.seconds() <= 0:
            break
        if j == 0:
            program, outputs = task.encoded(i)
        rows = outputs.mapped(task.asked.matrix[i, [j]], task.asked.offset[i, [j]])
        lower[i, j], x, _ = program.least(rows, task.seconds((task.n - i) * shape[1] - j))
        if x is not None:
            upper[i, j] = task.tried(i, x, np.arange(shape[1])[None] == j)[1]
    return Box(lower, upper)


# --- A question about a model ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A question about a model on n sets, in float64, and the model's graph at a batch of one."""

    model: Traceable
    arrays: Any
    traced: Traced
    asked: Question
    n: int
    hidden: Hidden | None
    end: float  # of the time, by the clock

    @classmethod
    def of(cls, f: Model, region: Any, prop: Property, seconds: float, hidden: Any) -> "_Task":
        """The task, with everything checked that can be."""
        end = time.monotonic() + seconds
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        if is_traced(f, region, prop):
            raise TypeError("mixed-integer programs are solved on the host: call this outside jit")
        if isinstance(region, L2Ball):
            raise ValueError(
                "an L2Ball is not linear: use exact.verify, or its jaxcert.sets.bounding_box(ball)"
            )
        model, arrays, asked = posed(f, region, prop)
        with jax.enable_x64(True):
            arrays, asked = ieee_float64(arrays), jax.tree.map(np.asarray, asked)
            n = len(asked.offset)
            return cls(model, arrays, model.trace(arrays, 1), asked, n, hidden, end)

    def seconds(self, parts: int = 1) -> float:
        """An equal share of the time left, 0 if there is none."""
        return max(0.0, self.end - time.monotonic()) / parts

    def encoded(self, i: int) -> tuple[Program, Linear]:
        """The model on set i."""
        hidden = crown if self.hidden is None else self.hidden
        if isinstance(hidden, tuple | list):
            hidden = [jax.tree.map(lambda end: end[i : i + 1], box) for box in hidden]
        # All rows at once: a loop over chunks of them would be compiled anew for each example.
        bound = bounder(hidden, chunk=1 << 20)
        with jax.enable_x64(True), np.errstate(invalid="ignore"):
            region = jax.tree.map(lambda a: a[i : i + 1], self.asked.region)
            program, outputs = encoded(self.traced, region, bound)
            program.keep_cut(self.asked.cuts.matrix[i], self.asked.cuts.offset[i])
            return program, outputs

    def tried(self, i: int, x: np.ndarray, clauses: np.ndarray) -> tuple[np.ndarray, float]:
        """A point of set i in the input's type, near x, and how far the model is from breaking one
        of the clauses (c, s) there, infinite if that is not known."""
        asked = jax.tree.map(lambda a: a[i : i + 1], self.asked)
        asked = dataclasses.replace(asked, clauses=clauses[None])
        with jax.enable_x64(True):
            start = x.reshape(1, *self.model.shape)
            point, worst = _tried(self.model, self.arrays, asked, start)
        return np.asarray(point)[0], float(worst[0])


@functools.partial(jax.jit, static_argnums=0)
def _tried(model: Traceable, arrays: Any, asked: Question, x: Any) -> tuple[Any, Any]:
    point = placed(asked, project(asked.whole, x), model.dtype)
    near = point.astype(model.dtype)
    fits = jnp.all(near.astype(point.dtype) == point) & surely_in(asked, point)
    worst = model.replayed(arrays, asked, point)
    return near, jnp.where(fits & (worst <= jnp.inf), worst, jnp.inf)
