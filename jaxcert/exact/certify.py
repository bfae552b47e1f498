"""Certificates from exact search, and the distance to the nearest other prediction."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.certify import certified_radius
from jaxcert.bounds.linear import crown
from jaxcert.certificate import ABSTAIN, Certificate, Status, Verdict, issue, predicted_class
from jaxcert.exact.outcome import Budget
from jaxcert.exact.verify import verify
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.model import Model, output_shape, run, split
from jaxcert.pytrees import pytree
from jaxcert.sets import Array, Ball, Box, L1Ball, L2Ball, LinfBall, checked, flat_norm
from jaxcert.specs import Spec, margins

_BALLS = {float("inf"): LinfBall, 2.0: L2Ball, 1.0: L1Ball}


def certify(f: Model, ball: Ball, *, budget: Budget = Budget()) -> Certificate:  # noqa: B008
    """Prove that f predicts one class on the whole ball, by search where bounds do not suffice.

    Args:
      f: the model, (b, *input) -> logits (b, k), k >= 2, rows independent.
      ball: a `LinfBall`, `L2Ball` or `L1Ball`.
      budget: of the whole call.

    Returns:
      A `Certificate`: f's own prediction, and as radius the ball's eps where every margin to
      another class was proved positive on all of it, 0 elsewhere; `ABSTAIN` where f's logits are
      not finite.

    Raises:
      As `verify`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> f = lambda x: jnp.concatenate([jnp.abs(x), 0.5 * x + 0.25], 1)
      >>> certificate = certify(f, LinfBall(jnp.array([[1.0], [0.25]]), 0.4))
      >>> print(certificate.prediction, certificate.radius)
      [0 1] [0.4 0. ]
    """
    # eps is rounded up to the float type of radii before it is proved
    region: Any = checked(ball)
    if not isinstance(region, LinfBall | L2Ball | L1Ball):
        raise TypeError(
            f"a certificate has a radius, so it is about a ball, not a {type(region).__name__}; "
            "use verify"
        )
    prediction, verdict = _asked(f, region, budget)
    proved = (verdict.status == Status.VERIFIED) & (prediction != ABSTAIN)
    radius = jnp.where(proved, jnp.broadcast_to(region.eps, proved.shape), 0.0)
    return issue(prediction, radius, norm=region.norm, within=region.valid)


def _asked(f: Model, ball: Ball, budget: Budget) -> tuple[Array, Verdict]:
    """The predictions at the centres, and whether they hold on the balls."""
    arrays, structure = split(f, ball.x)
    k = output_shape(structure, arrays, ball.x).shape[1]
    if k < 2:
        raise ValueError("the model must return at least 2 logits, (b, k) with k >= 2")
    prediction = predicted_class(run(structure, arrays, ball.x))
    known = prediction != ABSTAIN  # whoever has no prediction gets rows that nothing satisfies
    spec = margins(jnp.where(known, prediction, 0), k)
    matrix = jnp.where(known[:, None, None], spec.matrix, 0.0)
    return prediction, verify(f, ball, Spec(matrix, spec.offset), budget=budget)


@pytree
@dataclasses.dataclass(frozen=True)
class Distance:
    """How far each x is from an input at which another class scores as high as the predicted one.

    Attributes:
      prediction: f's own at x, int (b,), or `ABSTAIN`.
      lower: nothing nearer than that is predicted otherwise, nor ties; proved, rounded down, (b,).
      upper: the distance of `example`, or infinite if none was found, (b,).
      example: inputs that are predicted otherwise or tie, where `upper` is finite, (b, *input).
      norm: in which distances are measured; static.
    """

    prediction: Array
    lower: Array
    upper: Array
    example: Array
    norm: float = dataclasses.field(metadata={"static": True})


def distance(
    f: Model,
    x: Array,
    norm: float,
    *,
    largest: float = 1.0,
    valid: Box | None = None,
    tolerance: float = 0.01,
    budget: Budget = Budget(),  # noqa: B008
) -> Distance:
    """The distance from each x to the nearest input with another prediction, from both sides.

    Bisection with an exact search at each radius, all examples at once. It starts from the radius
    that `crown` certifies; a counterexample makes its own distance the upper end.

    Args:
      f: the model, (b, *input) -> logits (b, k), k >= 2, rows independent.
      x: inputs (b, *input).
      norm: as numpy's `ord`: inf, 2 or 1.
      largest: how far to look.
      valid: a `Box` that every input lies in anyway.
      tolerance: when to stop: lower >= (1 - tolerance) upper.
      budget: of the whole call.

    Returns:
      A `Distance`; where `largest` was proved, `lower` is that.

    Raises:
      As `verify`.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda x: jnp.concatenate([jnp.abs(x), 0.5 * x + 0.25], 1)
      >>> found = distance(f, jnp.array([[1.0]]), jnp.inf)
      >>> print(0.49 < found.lower[0] <= 0.5 <= found.upper[0] < 0.51)
      True
    """
    if norm not in _BALLS:
        raise ValueError(f"norm must be one of inf, 2 and 1, got {norm}")
    began = time.perf_counter()
    start = certified_radius(f, x, norm, largest=largest, valid=valid, method=crown, steps=8)
    known = _Bracket.of(start.radius, x, largest)
    while True:
        left = budget.seconds - (time.perf_counter() - began)
        undecided = known.undecided(tolerance)
        if not undecided.any() or left <= 0:
            break
        eps = np.where(undecided, known.next_radius(), 0.0)
        ball: Any = _BALLS[norm](x, jnp.asarray(eps, x.dtype), valid)
        # A first look may fail: what it costs must leave time for radii that are decided sooner.
        _, verdict = _asked(f, ball, dataclasses.replace(budget, seconds=left / 4))
        known.learn(undecided, verdict, eps, ball)
    return _distance(start.prediction, known.lower, known.upper, known.example, norm)


@dataclasses.dataclass
class _Bracket:
    """What is known of n distances, in numpy.

    Attributes:
      lower: radii that were proved, (n,).
      upper: distances of counterexamples, (n,), infinite if there is none.
      undecidable: the least radii that could not be decided, (n,), likewise.
      example: the counterexamples, (n, *input).
      largest: how far to look.
    """

    lower: np.ndarray
    upper: np.ndarray
    undecidable: np.ndarray
    example: np.ndarray
    largest: float

    @classmethod
    def of(cls, radius: Array, x: Array, largest: float) -> "_Bracket":
        """With the radii proved and nothing else known."""
        lower = np.asarray(radius, np.float64)
        nowhere = np.full(lower.shape, np.inf)
        return cls(lower, nowhere, nowhere, np.zeros(x.shape, x.dtype), largest)

    @property
    def end(self) -> np.ndarray:
        """Up to where a proof may still succeed."""
        return np.minimum(np.minimum(self.upper, self.undecidable), self.largest)

    def undecided(self, tolerance: float) -> np.ndarray:
        """Where the ends are too far apart."""
        return self.lower < (1 - tolerance) * self.end

    def next_radius(self) -> np.ndarray:
        """The largest one, where nothing failed so far, else the one in the middle."""
        untried = np.isinf(self.upper) & np.isinf(self.undecidable) & (self.lower < self.largest)
        return np.where(untried, self.largest, self.lower / 2 + self.end / 2)

    def learn(self, asked: np.ndarray, verdict: Verdict, eps: np.ndarray, ball: Any) -> None:
        """Enter what a verdict says of the balls that were asked about, whose radii were meant to
        be eps."""
        status = np.asarray(verdict.status)
        proved, broken = (asked & (status == s) for s in (Status.VERIFIED, Status.FALSIFIED))
        self.lower = np.where(proved, np.maximum(self.lower, np.asarray(ball.eps)), self.lower)
        found = np.asarray(verdict.counterexample)
        size = _length(found - np.asarray(ball.x), ball.norm)
        nearer = broken & (size < self.upper)
        self.upper = np.where(nearer, size, self.upper)
        self.example[nearer] = found[nearer]
        failed = asked & ~proved & ~broken
        self.undecidable = np.where(failed, np.minimum(self.undecidable, eps), self.undecidable)


def _length(delta: np.ndarray, norm: float) -> np.ndarray:
    """Norms in float64, (b,), rounded up."""
    with jax.enable_x64(True):
        size = np.asarray(flat_norm(jnp.asarray(delta, jnp.float64), norm))
    return size * (1 + 2.0**-36)


def _distance(prediction, lower, upper, example, norm: float) -> Distance:
    known = np.asarray(prediction) != ABSTAIN
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        down = rounded_down(jnp.asarray(np.where(known, lower, 0.0)), dtype)
        up = rounded_up(jnp.asarray(np.where(known, upper, 0.0)), dtype)
    return Distance(prediction, down, up, jnp.asarray(example), norm)
