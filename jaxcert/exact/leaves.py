"""Sub-domains with nothing left to split: a linear program, whose duals make a proof.

Where the sign of every kink is decided, the model is affine in the input, and whether a clause
holds there is a linear program: the least t >= row_i(x) with x in the box, its cuts at most 0 and
each hidden value that was cut in its range. A sub-domain may be empty, so ranges may be left at a
price, which bounds the duals: minimise t + p s with every hidden value at most s outside of its
range, and every cut at most s. HiGHS solves
this to a tolerance of 1e-7, so its answer decides nothing: its duals become the multipliers of the
linear bound (`activations.py`), which is evaluated with rounding counted, and its minimiser is
tried as a counterexample.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.concretise import box_of
from jaxcert.bounds.walk import Walk
from jaxcert.exact.activations import Domains, Multipliers, Pass, box_at
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question
from jaxcert.graph import Var
from jaxcert.sets import Array, Box, LinfBall


def settled(
    model: Traceable, arrays: Any, question: Question, domain: Domains
) -> tuple[bool, bool, np.ndarray]:
    """Whether one sub-domain of one question is proved, whether a point of it breaks the property,
    and that point, (*input). Only inside `enable_x64`.

    Args:
      question: a single clause on a single set, (1, ...), or (b, ...) of the same over and over
        where a batch of one is not traced as larger ones are.
      domain: one, likewise.
    """
    if not isinstance(question.region, Box | LinfBall):
        return False, False, np.zeros(model.shape)
    values = _affine(model, arrays, question, domain)
    found = _solved(tuple(np.asarray(value) for value in values), question, domain)
    if found is None:
        return False, False, np.zeros(model.shape)
    multipliers, point = found
    bound = _bounded(model, arrays, question, domain, multipliers)
    start = np.broadcast_to(point.reshape(1, *model.shape), (len(domain.bound), *model.shape))
    points, broken = _tried(model, arrays, question, start)
    return bool(bound[0] > 0), bool(broken[0]), np.asarray(points[0])


@functools.partial(jax.jit, static_argnums=0)
def _affine(
    model: Traceable, arrays: Any, question: Question, domain: Domains
) -> tuple[Array, Array, Array, Array]:
    """The hidden values (n, d) x + (n,) and the outputs (k, d) x + (k,) as functions of the input,
    along the lower lines of the sub-domain; not rounded outward."""
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
    return matrices[0].T, offsets[0], matrices[1].T, offsets[1]


def _solved(
    affine: tuple[np.ndarray, ...], question: Question, domain: Domains
) -> tuple[Multipliers, np.ndarray] | None:
    """Multipliers from the duals of the linear program, and its minimiser (d,)."""
    matrix, offset, outputs, constant = affine
    if not all(np.isfinite(part).all() for part in affine):
        return None
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    box = box_of(question.region, True)
    low, high = (np.asarray(end, np.float64)[0].reshape(-1) for end in (box.lower, box.upper))
    side, lower, upper = (np.asarray(a)[0] for a in (domain.side, domain.lower, domain.upper))
    used = np.asarray(question.clauses)[0, 0]
    rows = np.asarray(question.matrix)[0][used]
    level = rows @ constant + np.asarray(question.offset)[0][used]
    below, above = np.flatnonzero(side & 2), np.flatnonzero(side & 1)
    cuts = question.cuts
    held = np.concatenate([matrix[below], -matrix[above], np.asarray(cuts.matrix)[0]])
    room = np.concatenate(
        [upper[below] - offset[below], offset[above] - lower[above], -np.asarray(cuts.offset)[0]]
    )
    slopes = rows @ outputs
    free = -np.ones((len(rows), 1)), -np.ones((len(held), 1))  # of t and of s
    price = 1e4 * max(1.0, np.abs(slopes).max(initial=0.0))
    answer = linprog(
        np.concatenate([np.zeros(len(low)), [1.0, price]]),
        A_ub=csr_array(np.block([[slopes, free[0], 0 * free[0]], [held, 0 * free[1], free[1]]])),
        b_ub=np.concatenate([-level, room]),
        bounds=[*zip(low, high, strict=True), (None, None), (0, None)],
        method="highs",
    )
    if answer.status != 0:
        return None
    duals = -answer.ineqlin.marginals
    hidden = np.zeros(len(side))
    _, upward, downward, of_cuts = np.split(duals, np.cumsum([len(rows), len(below), len(above)]))
    hidden[below] += upward
    hidden[above] -= downward
    weights = np.zeros(len(used))
    weights[used] = np.maximum(duals[: len(rows)], 0)
    weights /= max(weights.sum(), 1e-30)
    share: Any = domain.multipliers.share
    each: Any = (hidden, weights, np.maximum(of_cuts, 0))
    others: Any = [np.broadcast_to(m, (len(share), len(m))) for m in each]
    given = Multipliers(share, *others)
    return given, np.clip(answer.x[:-2], low, high)


@functools.partial(jax.jit, static_argnums=0)
def _bounded(model, arrays, question, domain, multipliers) -> Array:
    return Pass(model, arrays, question, domain, jnp.float64).bound(multipliers)[0]


@functools.partial(jax.jit, static_argnums=0)
def _tried(model, arrays, question, points) -> tuple[Array, Array]:
    return model.tried(arrays, question, points, jnp.zeros(len(points), jnp.int32))[:2]
