"""A model as a search uses it: traced for proofs, and run at points that may break the property."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.attacks.gradient import Objective
from jaxcert.bounds.expand import expand
from jaxcert.bounds.interval import interval_bounds
from jaxcert.errors import MixedRows
from jaxcert.exact.outline import outline, require_alike
from jaxcert.exact.question import Question, one_by_one, question, rows_at, shortfall
from jaxcert.exact.quick import quick
from jaxcert.model import Model, Structure, as_float64, output_shape, split, uses_float64
from jaxcert.sets import (
    AnySet,
    Array,
    Box,
    InputSet,
    bounding_box,
    checked,
    contains,
    like,
    per_example,
    project,
)
from jaxcert.specs import Property
from jaxcert.tracing import Traced, trace_float64


def posed(
    f: Model, region: AnySet, prop: Property, rules: tuple[Any, ...] = ()
) -> "tuple[Traceable, Any, Question]":
    """What a call is about, checked: the model, its arrays, and the questions, one for each set."""
    mode, x = uses_float64(), like(region)
    x = jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    with jax.enable_x64(True):
        region = checked(region)
        arrays, structure = split(f, x)
    n, k = output_shape(structure, arrays, x).shape
    model = Traceable(structure, x.shape[1:], x.dtype, mode, rules)
    with jax.enable_x64(True):
        return model, arrays, question(one_by_one(region), prop, n, k)


@dataclasses.dataclass(frozen=True)
class Traceable:
    """All of a model but its arrays, with what a compiled search depends on beside them.

    Attributes:
      structure: of the model.
      shape: of one input.
      dtype: of inputs as the caller has them.
      mode: whether the caller is in JAX's x64 mode.
      rules: of bound propagation; one that is registered later compiles anew.
    """

    structure: Structure
    shape: tuple[int, ...]
    dtype: Any
    mode: bool
    rules: tuple[Any, ...]

    def trace(self, arrays: Any, count: int) -> Traced:
        """The graph for proofs about batches of `count`."""
        return trace_float64(self.structure, arrays, (count, *self.shape), self.dtype, self.mode)

    def least_batch(self, arrays: Any) -> int:
        """The least batch whose graph is that of larger ones: 1, or 2 where a single example is
        traced to other equations, as axes of size 1 may be.

        Here the contents of weights are known. Where a search is compiled they are not, and only
        equations and sizes can be compared (`beta_crown.Pass`); so two and many are compared here.

        Raises:
          UnsupportedEquation: the graph is another one for many.
        """
        one, two, many = (outline(expand(self.trace(arrays, n)[0]).graph, n) for n in (1, 2, 64))
        require_alike(two, many)
        return 1 if one.alike(two) else 2

    def require_alone_as_among_others(self, arrays: Any, region: InputSet) -> None:
        """Refuse a model that gives the same input, from the middle of one set, other outputs in
        another place of a batch or in a batch of another size: sub-domains come in all of them.

        Raises:
          MixedRows: it does.
        """
        with jax.enable_x64(self.mode):
            outputs = np.asarray(_outputs(self, arrays, region), np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.abs(outputs - outputs[0])
        if (apart > 1e-3 * np.max(np.abs(outputs[0]), initial=0.0)).any():
            raise MixedRows(
                "the model's outputs for an input depend on its place in the batch or on the size "
                "of the batch; give it rows that are independent"
            )

    def objective(self, arrays: Any, question: Question) -> Objective:
        """What an attack makes small: how far point i is from breaking a clause of question i."""

        return lambda points: self._about(arrays, question, points)[0]

    def _about(self, arrays: Any, question: Question, points: Array) -> tuple[Array, Array]:
        """About how far point i is from breaking question i, and the sizes of what that sums."""
        with jax.enable_x64(self.mode):
            outputs = quick(self.structure.build(arrays), points.astype(self.dtype))
        outputs, index = outputs.astype(jnp.float64), jnp.arange(len(points))
        rows = rows_at(question, outputs, index)
        sizes = dataclasses.replace(
            question, matrix=jnp.abs(question.matrix), offset=jnp.abs(question.offset)
        )
        size = jnp.max(rows_at(sizes, jnp.abs(outputs), index), 1, initial=0.0)
        return jnp.min(shortfall(rows, question.clauses), 1, initial=jnp.inf), size

    def tried(
        self, arrays: Any, question: Question, points: Array, owner: Array
    ) -> tuple[Array, Array, Array]:
        """Points as close by as the input's type allows, where the model breaks the property there,
        in its own arithmetic as well as in float64, and about how far it is from it, (p,)."""
        mine = jax.tree.map(lambda a: a[owner], question)
        points = placed(mine, points, self.dtype)
        about, size = self._about(arrays, mine, points)
        # Few points are near enough for rounding to matter: these are looked at more closely.
        worst = jax.lax.cond(
            jnp.any(~(about > 2.0**-10 * size)),
            lambda: self.replayed(arrays, mine, points),
            lambda: about,
        )
        broken = (worst <= 0) & surely_in(mine, points)
        return points, broken, jnp.where(jnp.isnan(worst), jnp.inf, worst)

    def replayed(self, arrays: Any, question: Question, points: Array) -> Array:
        """How far the model is from breaking the property at one point of each question, (p,), in
        its own arithmetic or in float64, whichever is further."""

        def at(arrays: Any, x: Array, mode: bool) -> Array:
            with jax.enable_x64(mode):
                outputs = self.structure.build(arrays)(x)
            rows = rows_at(question, outputs.astype(jnp.float64), jnp.arange(len(x)))
            return jnp.min(shortfall(rows, question.clauses), 1)

        own = at(arrays, points.astype(self.dtype), self.mode)
        try:
            wide = at(as_float64(arrays), points, True)
        except TypeError:  # the model closes over float32 arrays, which some operations insist on
            graph, rows = self.trace(arrays, len(points))
            box = interval_bounds(graph, rows, Box(points, points), question.rows, True)
            wide = jnp.min(shortfall(box.upper, question.clauses), 1)
        return jnp.maximum(own, wide)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(model: Traceable, arrays: Any, region: InputSet) -> Array:
    """Of the middle of one set in each place of batches of 1, 2 and 64, (67, ...)."""
    f, box = model.structure.build(arrays), bounding_box(region)
    ends = jnp.stack([box.lower, box.upper])
    known = jnp.isfinite(ends)  # the middle between an end and infinity is the end; without ends, 0
    x = jnp.sum(jnp.where(known, ends / jnp.maximum(jnp.sum(known, 0), 1), 0.0), 0)
    x = x.astype(model.dtype)
    return jnp.concatenate([f(jnp.broadcast_to(x, (n, *model.shape))) for n in (1, 2, 64)])


def placed(question: Question, points: Array, dtype: Any) -> Array:
    """Points near others that the input's type represents, if there are such in the sets.

    In balls and boxes they are rounded towards the centre, which does not lead out. Where there are
    cuts, inputs that rounding would move out of the box become ends of it. Points are projected on
    the set and drawn inside, by more than rounding; what does not surely satisfy the cuts then, as
    in a set without interior, stays where it was projected.
    """
    region, cuts = question.region, question.cuts
    if not isinstance(region, Box):  # off the surface, where rounding matters
        points = region.x + (1 - 2.0**-34) * (points - region.x)
    if not cuts.count:
        centre = region.lower / 2 + region.upper / 2 if isinstance(region, Box) else region.x
        near = points.astype(dtype)
        beyond = jnp.abs(near - centre) > jnp.abs(points - centre)
        near = jnp.where(beyond, jnp.nextafter(near, centre.astype(dtype)), near)
        rounded = near.astype(points.dtype)
        fits = per_example(surely_in(question, rounded), points)
        return jnp.where(fits, rounded, points)
    assert isinstance(region, Box)

    def snapped(x: Array) -> Array:
        return jnp.clip(x.astype(dtype).astype(x.dtype), region.lower, region.upper)

    near = project(question.whole, points)
    inner = cuts.inner.reshape(near.shape)
    size = jnp.maximum(jnp.abs(region.lower), jnp.abs(region.upper)).reshape(len(near), 1, -1)
    margin = 2 * float(jnp.finfo(dtype).eps) * jnp.sum(jnp.abs(cuts.matrix) * size, 2)
    here, there = (cuts.at(x).upper + margin for x in (near, inner))
    share = jnp.where(here > 0, here / jnp.where(here > there, here - there, 1.0), 0.0)
    share = jnp.minimum(jnp.max(share, 1), 1.0)
    drawn = snapped(near + per_example(share, near) * (inner - near))
    return jnp.where(per_example(cuts.surely_hold(drawn), near), drawn, snapped(near))


def surely_in(question: Question, x: Array) -> Array:
    """Whether each point lies in its set, rounding of norms and cuts counted."""
    region = question.region
    if not isinstance(region, Box):
        region = dataclasses.replace(region, eps=region.eps * (1 - 2.0**-36))
    return contains(region, x) & question.cuts.surely_hold(x)
