"""Sub-domains with nothing left to split: a convex program, whose multipliers make a proof.

Where the sign of every kink is decided, the model is affine in the input, and whether a clause
holds there is a convex program: the least t >= row_i(x) with x in the set, its cuts at most 0 and
each hidden value that was cut in its range. `programs.py` solves it to some tolerance, so that its
answer decides nothing: its multipliers become those of the linear bound (`beta_crown.py`), which
is evaluated with rounding counted, and its minimiser is tried as a counterexample.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.concretise import box_of
from jaxcert.bounds.walk import Walk
from jaxcert.certificate import Reason
from jaxcert.exact.beta_crown import Pass
from jaxcert.exact.domains import Domains, Multipliers, box_at
from jaxcert.exact.model import Traceable
from jaxcert.exact.programs import Program, Solution, solved
from jaxcert.exact.question import Question
from jaxcert.graph import Var
from jaxcert.sets import Array, Box, LinfBall

KINKED = frozenset("relu leaky_relu abs max min".split())
"""Functions that are affine on either side of where they are cut."""


@dataclasses.dataclass(frozen=True)
class Settled:
    """What became of a leaf.

    Attributes:
      reason: NONE if it is proved or broken; LOOSE if it is neither and its model is still a
        relaxation, as of sigmoids and of maxima over several operands; else NUMERICS.
      example: a point that breaks the property, (*input), or None.
    """

    reason: Reason
    example: np.ndarray | None = None


def settle(
    model: Traceable, arrays: Any, question: Question, domain: Domains, seconds: float
) -> Settled:
    """Prove one sub-domain of one question or find a counterexample. Only inside `enable_x64`.

    Args:
      question: a single clause on a single set, (1, ...), or (b, ...) of the same over and over
        where a batch of one is not traced as larger ones are.
      domain: one, likewise.
      seconds: for the convex program.
    """
    affine = _Affine(*[np.asarray(part) for part in _affine(model, arrays, question, domain)])
    open_ = Settled(Reason.NUMERICS if affine.exact else Reason.LOOSE)
    found = solved(_program(affine, question, domain), seconds)
    if found is None:
        return open_
    bound = _bounded(model, arrays, question, domain, _multipliers(found, question, domain))
    if bound[0] > 0:
        return Settled(Reason.NONE)
    start = np.broadcast_to(found.x.reshape(model.shape), (len(bound), *model.shape))
    points, broken = _tried(model, arrays, question, start)
    return Settled(Reason.NONE, np.asarray(points[0])) if broken[0] else open_


@dataclasses.dataclass(frozen=True)
class _Affine:
    """Hidden values, hidden x + offset, and outputs, outputs x + constant, of a flat input x; and
    whether the model is that on the sub-domain, and not only bounded by it."""

    hidden: np.ndarray
    offset: np.ndarray
    outputs: np.ndarray
    constant: np.ndarray
    exact: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _affine(
    model: Traceable, arrays: Any, question: Question, domain: Domains
) -> tuple[Array, Array, Array, Array, Array]:
    """The parts of an `_Affine`, along the lower lines of the sub-domain; not rounded outward."""
    batch = len(domain.bound)
    graph, rows = model.trace(arrays, batch)
    walk = Walk(graph, rows, question.region, False)
    walk.run(functools.partial(box_at, domain.lower, domain.upper), every=True)
    hidden = list(walk.refined)

    def forward(x: Array, constant: Any) -> tuple[Array, Array]:
        env: dict[Var, Array] = {walk.net.input: x}
        for v, plane in walk.planes.items():
            value = plane.apply(plane.lower, *[env[w] for w in plane.operands])
            offset = 0.0 if plane.below is None else plane.below * constant
            env[v] = jnp.broadcast_to(value + offset, v.shape)
        flat = [walk.net.flat(env[v], v)[0] for v in hidden]
        return jnp.concatenate([jnp.zeros(0), *flat]), env[walk.output][0].reshape(-1)

    size = int(np.prod(model.shape))
    unit = jnp.eye(size).reshape(size, 1, *model.shape)
    unit = jnp.broadcast_to(unit, (size, batch, *model.shape))
    matrices = jax.lax.map(lambda x: forward(x, 0.0), unit)
    offsets = forward(jnp.zeros((batch, *model.shape)), 1.0)
    return matrices[0].T, offsets[0], matrices[1].T, offsets[1], _is_exact(walk)


def _is_exact(walk: Walk) -> Array:
    """Whether the planes of each function are one, or not known. Functions with a kink are cut at
    the float32 number next to it, which leaves them a little apart."""

    def same(tolerance: float, a: Any, b: Any) -> Array:
        near = jnp.abs(a - b) <= tolerance * (1 + jnp.abs(a) + jnp.abs(b))
        return jnp.all((a == b) | near | (jnp.isnan(a) & jnp.isnan(b)))

    found = [jnp.asarray(True)]
    for v, plane in walk.planes.items():
        tolerance = 1e-6 if walk.net.makers[v].name in KINKED else 0.0
        below, above = (plane.lower, plane.below), (plane.upper, plane.above)
        parts = jax.tree.map(functools.partial(same, tolerance), below, above)
        found += jax.tree.leaves(parts)
    return jnp.all(jnp.stack(found))


def _program(affine: _Affine, question: Question, domain: Domains) -> Program:
    """The clause's rows, and the ranges and cuts that hold."""
    box = box_of(question.region, True)
    low, high = (np.asarray(end, np.float64)[0].reshape(-1) for end in (box.lower, box.upper))
    used, cuts = np.asarray(question.clauses)[0, 0], question.cuts
    rows = np.asarray(question.matrix)[0][used]
    below, above = _ends(domain)
    lower, upper = (np.asarray(end)[0] for end in (domain.lower, domain.upper))
    program = Program(
        rows @ affine.outputs,
        rows @ affine.constant + np.asarray(question.offset)[0][used],
        np.concatenate([affine.hidden[below], -affine.hidden[above], np.asarray(cuts.matrix)[0]]),
        np.concatenate([
            upper[below] - affine.offset[below],
            affine.offset[above] - lower[above],
            -np.asarray(cuts.offset)[0],
        ]),
        low,
        high,
    )  # fmt: skip
    if isinstance(question.region, Box | LinfBall):
        return program
    ball = question.region
    centre, eps = np.asarray(ball.x, np.float64)[0].reshape(-1), float(np.asarray(ball.eps)[0])
    return dataclasses.replace(program, centre=centre, eps=eps, norm=ball.norm)


def _ends(domain: Domains) -> tuple[np.ndarray, np.ndarray]:
    """The hidden values whose upper, and those whose lower end is a cut."""
    side = np.asarray(domain.side)[0]
    return np.flatnonzero(side & 2), np.flatnonzero(side & 1)


def _multipliers(found: Solution, question: Question, domain: Domains) -> Multipliers:
    """Those of a bound on the sub-domain."""
    below, above = _ends(domain)
    upward, downward, cuts = np.split(found.multipliers, np.cumsum([len(below), len(above)]))
    hidden = np.zeros(domain.side.shape[1])
    hidden[below] += upward
    hidden[above] -= downward
    used = np.asarray(question.clauses)[0, 0]
    weights = np.zeros(len(used))
    weights[used] = found.weights / max(found.weights.sum(), 1e-30)
    share: Any = domain.multipliers.share
    each: Any = hidden, weights, cuts
    others: Any = [np.broadcast_to(part, (len(share), len(part))) for part in each]
    return Multipliers(share, *others)


@functools.partial(jax.jit, static_argnums=0)
def _bounded(model, arrays, question, domain, multipliers) -> Array:
    return Pass(model, arrays, question, domain, jnp.float64).bound(multipliers)[0]


@functools.partial(jax.jit, static_argnums=0)
def _tried(model, arrays, question, points) -> tuple[Array, Array]:
    return model.tried(arrays, question, points, jnp.zeros(len(points), jnp.int32))[:2]
