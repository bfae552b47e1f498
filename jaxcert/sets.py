"""Input sets: where a perturbed input may lie.

A set is a frozen pytree of arrays, batch axis first: `Box(lower, upper)`, `LinfBall(x, eps)`,
`L2Ball(x, eps)`, `L1Ball(x, eps)`, `Polytope(lower, upper, matrix, offset)`. A ball may carry a
valid box (pixels in [0, 1]); the set is then their intersection. Constructors check nothing,
because JAX rebuilds pytrees with tracers and placeholders inside; every entry point of the library
calls `checked`.
"""

import dataclasses
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import is_traced
from jaxcert.pytrees import pytree

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Box:
    """All x with lower <= x <= upper, elementwise.

    Attributes:
      lower: array (b, *input), or a scalar where the box is the valid range of a ball.
      upper: array of the same shape.
    """

    lower: Any
    upper: Any


@pytree
@dataclasses.dataclass(frozen=True)
class Grid:
    """All x whose coordinates are integers divided by `levels`: pixel values k / 255.

    A floating point number stands for the integer that it is nearest to.

    Attributes:
      levels: grid points per unit; static.
    """

    levels: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Ball:
    """What the three balls share.

    Attributes:
      x: centres, (b, *input).
      eps: radius, a scalar or one per example (b,).
      valid: a `Box` every input must lie in anyway (`Box(0.0, 1.0)` for images), or None.
    """

    x: Any
    eps: Any
    valid: Box | None = None
    norm: ClassVar[float]


@pytree
@dataclasses.dataclass(frozen=True)
class LinfBall(_Ball):
    """All x' with max_i |x'_i - x_i| <= eps, and x' in `valid` where given."""

    norm: ClassVar[float] = float("inf")


@pytree
@dataclasses.dataclass(frozen=True)
class L2Ball(_Ball):
    """All x' with sqrt(sum_i (x'_i - x_i)^2) <= eps, and x' in `valid` where given."""

    norm: ClassVar[float] = 2.0


@pytree
@dataclasses.dataclass(frozen=True)
class L1Ball(_Ball):
    """All x' with sum_i |x'_i - x_i| <= eps, and x' in `valid` where given."""

    norm: ClassVar[float] = 1.0


@pytree
@dataclasses.dataclass(frozen=True)
class Polytope:
    """All x of a box that satisfy linear inequalities: lower <= x <= upper, matrix x + offset <= 0.

    `exact.verify` decides about the set itself. The methods of `bounds`, which know boxes and
    balls, bound on the whole box: their bounds hold, but do not become tighter by the inequalities.
    The set may be empty; every property holds on it then.

    Attributes:
      lower, upper: the box, (b, *input) each.
      matrix: the rows of p inequalities, (b, p, *input), or (p, *input) for all examples.
      offset: (b, p), (p,) or a number.

    Example:
      >>> triangle = Polytope(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), -1.0)
      >>> print(contains(triangle, jnp.array([[0.25, 0.5]])), project(triangle, jnp.ones((1, 2))))
      [ True] [[0.5 0.5]]
    """

    lower: Any
    upper: Any
    matrix: Any
    offset: Any


Ball: TypeAlias = LinfBall | L2Ball | L1Ball
InputSet: TypeAlias = Box | LinfBall | L2Ball | L1Ball
AnySet: TypeAlias = Box | LinfBall | L2Ball | L1Ball | Polytope
_Set = TypeVar("_Set", bound=AnySet)

ROUNDS = 32  # of the iteration that projects on a polytope


def per_example(value: Any, like: Any) -> Array:
    """A scalar or (b,) value shaped to broadcast against `like`, (b, *input)."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (jnp.ndim(like) - 1)) if value.ndim else value


def flat_norm(delta: Array, norm: float) -> Array:
    """The norm of each example's perturbation, (b, *input) -> (b,)."""
    delta = delta.reshape(delta.shape[0], -1)
    if norm != 2:
        return jnp.linalg.norm(delta, ord=norm, axis=1)
    # In units of the largest entry: squares of large ones overflow, those of small ones are 0.
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(delta), 1, initial=0.0))
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
    return unit * jnp.linalg.norm(delta / unit[:, None], axis=1)


def like(region: AnySet) -> Any:
    """An array with the shape and the type of the set's inputs."""
    return region.lower if isinstance(region, Box | Polytope) else region.x


def uncut(region: AnySet) -> InputSet:
    """The set without linear inequalities, which is larger."""
    return Box(region.lower, region.upper) if isinstance(region, Polytope) else region


def bounding_box(region: AnySet) -> Box:
    """The smallest box around a set, rounded to nearest (proofs widen it afterwards); the box that
    a `Polytope` was cut from."""
    if isinstance(region, Box | Polytope):
        return Box(region.lower, region.upper)
    eps = per_example(region.eps, region.x)
    lower, upper = region.x - eps, region.x + eps
    if region.valid is not None:
        lower = jnp.maximum(lower, region.valid.lower)
        upper = jnp.minimum(upper, region.valid.upper)
    return Box(lower, upper)


def contains(region: AnySet, x: Array) -> Array:
    """Whether each x of the batch lies in its set, (b, *input) -> bool (b,)."""
    axes = tuple(range(1, jnp.ndim(x)))
    if isinstance(region, Polytope):
        matrix, offset = _rows(region, x)
        below = jnp.sum(matrix * x[:, None], tuple(range(2, matrix.ndim))) + offset <= 0
        return contains(uncut(region), x) & jnp.all(below, 1)
    box = region if isinstance(region, Box) else region.valid
    inside = jnp.ones(x.shape[0], bool)
    if box is not None:
        inside = jnp.all((box.lower <= x) & (x <= box.upper), axis=axes)
    if isinstance(region, Box):
        return inside
    return inside & (flat_norm(x - region.x, region.norm) <= region.eps)


def _rows(region: Polytope, x: Any) -> tuple[Array, Array]:
    """The inequalities of each example, (b, p, *input) and (b, p), in the type of x."""
    matrix = jnp.asarray(region.matrix, x.dtype)
    shape = (x.shape[0], matrix.shape[matrix.ndim - x.ndim], *x.shape[1:])
    offset = jnp.asarray(region.offset, x.dtype)
    return jnp.broadcast_to(matrix, shape), jnp.broadcast_to(offset, shape[:2])


def project(region: AnySet, x: Array) -> Array:
    """The point of the set nearest to x in L2, per example.

    For a polytope the point is that of an iteration of `ROUNDS` rounds: always in the box, but near
    the nearest point of the set only, and maybe outside of some inequalities.

    For a ball of norm p cut by a box, the minimiser of |z - x|^2 under the multiplier t of the
    norm constraint is separable and |z(t) - centre|_p falls with t, so t is found by bisection.
    """
    box = bounding_box(region)
    if isinstance(region, Polytope):
        return _projected(region, x)
    if isinstance(region, Box | LinfBall):
        return jnp.clip(x, box.lower, box.upper)

    def candidate(t: Array) -> Array:
        t, delta = per_example(t, x), x - region.x
        if region.norm == 2.0:
            shrunk = delta / (1 + t)
        else:
            shrunk = jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - t, 0)
        return jnp.clip(region.x + shrunk, box.lower, box.upper)

    def size(z: Array) -> Array:
        return flat_norm(z - region.x, region.norm)

    eps = jnp.broadcast_to(jnp.asarray(region.eps, x.dtype), x.shape[:1])
    low = jnp.zeros_like(eps)
    start = flat_norm(x - region.x, region.norm)
    high = start if region.norm == 1.0 else start / jnp.maximum(eps, jnp.finfo(x.dtype).tiny)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        outside = size(candidate(middle)) > eps
        return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    already_inside = size(candidate(low * 0)) <= eps
    return candidate(jnp.where(already_inside, 0.0, high))


def _projected(region: Polytope, x: Array) -> Array:
    """Hildreth's method: with the right multipliers m >= 0 of the inequalities a z + b <= 0, the
    nearest point is z(m) = clip(x - sum_i m_i a_i), and (a_i z + b_i) / |a_i|^2 is a step of ascent
    on the dual that never overshoots; inequalities take turns."""
    matrix, offset = _rows(region, x)
    axes = tuple(range(1, x.ndim))

    def turn(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moved, m = carry
        i = t % matrix.shape[1]
        row, b = (jax.lax.dynamic_index_in_dim(a, i, 1, False) for a in (matrix, offset))
        value = jnp.sum(row * jnp.clip(moved, region.lower, region.upper), axes) + b
        size = jnp.sum(jnp.square(row), axes)
        mine = jax.lax.dynamic_index_in_dim(m, i, 1, False)
        step = jnp.where(size > 0, value / jnp.where(size > 0, size, 1.0), 0.0)
        step = jnp.maximum(step, -mine)
        m = jax.lax.dynamic_update_index_in_dim(m, mine + step, i, 1)
        return moved - per_example(step, x) * row, m

    start = x, jnp.zeros_like(offset)
    if matrix.shape[1]:
        start = jax.lax.fori_loop(0, ROUNDS * matrix.shape[1], turn, start)
    return jnp.clip(start[0], region.lower, region.upper)


def sample(key: Array, region: AnySet, n: int) -> Array:
    """n points of each example's set, (n, b, *input); not uniform for cut balls, always inside.

    Half of the draws are pushed to the boundary, where bounds fail first. Points are inside up to
    float rounding; those of a polytope are projections of points of its box, see `project`.
    """
    if isinstance(region, Polytope):
        return jax.vmap(lambda x: project(region, x))(sample(key, uncut(region), n))
    box = bounding_box(region)
    shape = (n, *jnp.shape(box.lower))
    inner, outer = jax.random.split(key)
    if isinstance(region, Box | LinfBall):
        unit = jax.random.uniform(inner, shape, box.lower.dtype)
        corner = jax.random.bernoulli(outer, 0.5, shape).astype(unit.dtype)
        unit = jnp.where(_alternate(n, unit), unit, corner)
        # lower + unit * (upper - lower) can leave the box by rounding; the clip brings it back.
        return jnp.clip(box.lower + unit * (box.upper - box.lower), box.lower, box.upper)
    direction = jax.random.normal(inner, shape, region.x.dtype)
    size = jax.vmap(lambda d: flat_norm(d, region.norm))(direction)
    length = jnp.where(_alternate(n, size), jax.random.uniform(outer, size.shape), 1.0)
    scale = region.eps * length / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
    delta = direction * scale.reshape(scale.shape + (1,) * (direction.ndim - 2))
    return jnp.clip(region.x + delta, box.lower, box.upper)


def _alternate(n: int, like: Array) -> Array:
    return (jnp.arange(n) % 2 == 0).reshape((n,) + (1,) * (like.ndim - 1))


def checked(region: _Set) -> _Set:
    """The set with its shapes, dtypes and, where they are concrete, its values checked.

    Wrong shapes, dtypes and concrete values raise. Traced values cannot raise: an example whose
    set is invalid gets NaN ends, from which no method can prove anything. A Python eps is rounded
    up to the default float type, so that the ball covers the radius that was asked for.
    """
    return _checked(region)  # type: ignore[return-value]


def _checked(region: AnySet) -> AnySet:
    if isinstance(region, Box):
        return _checked_box(region)
    if isinstance(region, Polytope):
        return _checked_polytope(region)
    if not isinstance(region, LinfBall | L2Ball | L1Ball):
        raise TypeError(
            f"expected a Box, LinfBall, L2Ball, L1Ball or Polytope, got {type(region).__name__}; "
            "wrap the inputs: LinfBall(x, eps)"
        )
    _require_float_batch(region.x, "x")
    eps = _rounded_up(region.eps)
    if eps.ndim > 1 or (eps.ndim == 1 and eps.shape[0] != jnp.shape(region.x)[0]):
        raise ValueError(
            f"eps must be a scalar or one per example ({jnp.shape(region.x)[0]},), "
            f"got shape {eps.shape}"
        )
    valid = region.valid
    if valid is not None and not isinstance(valid, Box):
        raise TypeError(f"valid must be a Box such as Box(0.0, 1.0), got {type(valid).__name__}")
    _require_or(eps, lambda e: e >= 0, "eps must be >= 0 and not NaN")
    _require_or(region.x, np.isfinite, "x must be finite")
    x = region.x
    bad = ~(eps >= 0) | ~jnp.all(jnp.isfinite(x), axis=tuple(range(1, jnp.ndim(x))))
    if valid is not None:
        inside = (valid.lower <= x) & (x <= valid.upper)
        _require_or(inside, lambda i: i, "x lies outside its valid box; clip it first")
        bad = bad | ~jnp.all(inside, axis=tuple(range(1, jnp.ndim(x))))
    if is_traced(region):
        eps = jnp.where(bad, jnp.nan, eps)
    return type(region)(x, eps, valid)


def _checked_box(box: Box) -> Box:
    _require_float_batch(box.lower, "lower")
    _require_float_batch(box.upper, "upper")
    if jnp.shape(box.lower) != jnp.shape(box.upper):
        raise ValueError(
            f"lower and upper must have one shape, got {jnp.shape(box.lower)} "
            f"and {jnp.shape(box.upper)}"
        )
    ordered = box.lower <= box.upper  # False where either is NaN
    _require_or(ordered, lambda o: o, "every lower must be <= its upper, and none NaN")
    if not is_traced(box):
        return box
    row_ok = jnp.all(ordered, axis=tuple(range(1, jnp.ndim(box.lower))))
    row_ok = per_example(row_ok, box.lower)
    return Box(jnp.where(row_ok, box.lower, jnp.nan), jnp.where(row_ok, box.upper, jnp.nan))


def _checked_polytope(region: Polytope) -> Polytope:
    box = _checked_box(Box(region.lower, region.upper))
    shape, matrix, offset = jnp.shape(box.lower), region.matrix, region.offset
    _require_float(matrix, "matrix")
    if hasattr(offset, "dtype"):
        _require_float(offset, "offset")
    lead = jnp.shape(matrix)[: max(jnp.ndim(matrix) - len(shape) + 1, 0)]
    fits = jnp.shape(matrix) == (*lead, *shape[1:])
    if not fits or len(lead) not in (1, 2) or lead[:-1] not in ((), shape[:1]):
        raise ValueError(
            f"matrix must have shape (p, *input) or (b, p, *input) with inputs {shape[1:]} and b = "
            f"{shape[0]}, got {jnp.shape(matrix)}"
        )
    if jnp.shape(offset) not in ((), lead[-1:], (shape[0], lead[-1])):
        raise ValueError(
            f"offset must be a number, ({lead[-1]},) or ({shape[0]}, {lead[-1]}) for {lead[-1]} "
            f"inequalities, got shape {jnp.shape(offset)}"
        )
    _require_or(matrix, np.isfinite, "matrix must be finite")
    _require_or(offset, np.isfinite, "offset must be finite")
    if not is_traced(region):
        return Polytope(box.lower, box.upper, matrix, offset)
    rows = jnp.broadcast_to(matrix, (shape[0], lead[-1], *shape[1:]))
    good = jnp.all(jnp.isfinite(rows), axis=tuple(range(1, rows.ndim)))
    good &= jnp.all(jnp.isfinite(jnp.broadcast_to(offset, rows.shape[:2])), axis=1)
    good = per_example(good, box.lower)
    lower, upper = (jnp.where(good, end, jnp.nan) for end in (box.lower, box.upper))
    return Polytope(lower, upper, matrix, offset)


def _require_float(x: Any, name: str) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        found = x.dtype if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"{name} must be an array of floating point numbers, got {found}")


def _require_float_batch(x: Any, name: str) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array (b, *input), got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {x.dtype}; "
            f"scale it the way the model expects, e.g. {name}.astype(jnp.float32) / 255"
        )
    if x.ndim and x.shape[0] == 0:
        raise ValueError(f"{name} holds no examples: its shape is {x.shape}")
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have a batch axis first, (b, *input); got shape {x.shape}: "
            f"write {name}[None] for one example"
        )


def _require_or(value: Any, condition, message: str) -> None:
    """Raise where a concrete value breaks the condition; traced values are handled by NaN."""
    if not is_traced(value):
        host = np.asarray(value)
        holds = np.asarray(condition(host), bool)
        if not holds.all():
            raise ValueError(f"{message} (broken in {int((~holds).sum())} of {holds.size} places)")


def _rounded_up(eps: Any) -> Array:
    """eps as an array of the default float type, never below the number that was passed."""
    if hasattr(eps, "dtype") and not isinstance(eps, np.ndarray | np.generic):
        return jnp.asarray(eps, jnp.result_type(float, eps.dtype))
    exact = np.asarray(eps, np.float64)
    dtype = jax.dtypes.canonicalize_dtype(float)
    nearest = exact.astype(dtype)
    return jnp.asarray(
        np.where(nearest < exact, np.nextafter(nearest, dtype.type(np.inf)), nearest)
    )
