"""Forward linear bounds: every variable between two affine functions of the input.

For an input with few entries it is cheaper to push the functions of all hidden values forward than
to pull rows back from each of them (Xu et al., "Automatic perturbation analysis for scalable
certified robustness and beyond", NeurIPS 2020, section 3.2). With lower <= x <= upper functions of
the input, centre and radius (lower + upper) / 2 and (upper - lower) / 2, an affine w x + t obeys

    w centre - |w| radius + t  <=  w x + t  <=  w centre + |w| radius + t

at every point, so the functions' coefficients and constants move like intervals do.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.backward import entries
from jaxcert.bounds.concretise import box_of, least
from jaxcert.bounds.hidden import with_dust
from jaxcert.bounds.last_layer import spec_matrix
from jaxcert.bounds.linear import shifted, walking
from jaxcert.bounds.planes import Planes, absolute
from jaxcert.bounds.transform import Bound
from jaxcert.bounds.walk import Walk, meet
from jaxcert.graph import Var
from jaxcert.model import Model
from jaxcert.sets import Array, Box
from jaxcert.specs import Spec


def forward_linear(f: Model, *, outward: bool = False) -> Bound:
    """Linear bounds of f in one pass forward, for models of few inputs.

    Time and memory are those of about 2 (d + 1) forward passes for d inputs per example, whatever
    the depth. Hidden values get linear bounds too, but less tight ones than `crown` gives them.
    Arguments, results and errors as for `crown`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> box = forward_linear(lambda x: jnp.maximum(x, 0) - x)(LinfBall(jnp.ones((1, 1)), 0.5))
      >>> print(box.lower, box.upper)
      [[0.]] [[0.]]
    """
    return walking(f, outward, _bound)


def _bound(walk: Walk, spec: Spec | None) -> Box:
    functions = _Functions(walk)
    walk.run(functions.box)
    out = walk.output
    if spec is None:
        return meet(walk.boxes[out], functions.box(walk, out))
    matrix = spec_matrix(spec, out.shape, walk.dtype)

    def apply(c, y):
        return jnp.sum(c * y[:, None, :], 2)

    functions.of(out)
    pair = functions.through(Planes((out,), apply, matrix, matrix))
    return shifted(walk, spec, functions.concretised(pair, jnp.transpose))


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Affine functions below and above a variable.

    Attributes:
      lower, upper: (d + 1, *shape), coefficients of the input's d entries and the constant last;
        the same object where the functions are the same.
    """

    lower: Array
    upper: Array


class _Functions:
    """The pairs of all variables, worked out as they are asked for."""

    def __init__(self, walk: Walk):
        self.walk = walk
        x = walk.net.input
        shape = x.shape[1:]
        self.d = math.prod(shape)
        unit = jnp.eye(self.d, dtype=walk.dtype).reshape(self.d, 1, *shape)
        unit = jnp.broadcast_to(unit, (self.d, *x.shape))
        start = jnp.concatenate([unit, jnp.zeros((1, *x.shape), walk.dtype)])
        box = box_of(walk.region, walk.outward)
        self._reach = jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))
        self.pairs = {x: _Pair(start, start)}

    def of(self, v: Var) -> _Pair:
        """The functions around a variable whose planes are known."""
        for w, plane in self.walk.planes.items():
            if w not in self.pairs:
                self.pairs[w] = self.through(plane)
        return self.pairs[v]

    def through(self, plane: Planes) -> _Pair:
        """The functions around an equation's result, from those around its operands."""
        operands = [self.pairs[x] for x in plane.operands]
        affine = plane.affine and all(p.lower is p.upper for p in operands)
        if affine and plane.below is plane.above and not self.walk.outward:
            both = self._side(plane, plane.lower, plane.below, operands, 0)
            return _Pair(both, both)
        lower = self._side(plane, plane.lower, plane.below, operands, -1)
        upper = self._side(plane, plane.upper, plane.above, operands, 1)
        return _Pair(lower, upper)

    def _side(self, plane, weight, offset, operands, sign) -> Array:
        centres = [p.lower if p.lower is p.upper else (p.lower + p.upper) / 2 for p in operands]
        if not operands:
            zeros = jnp.zeros((self.d + 1, *jnp.shape(offset)), self.walk.dtype)
            return zeros.at[-1].set(offset)
        result = self._mapped(plane, weight, centres)
        if any(p.lower is not p.upper for p in operands):
            radii = [(p.upper - p.lower) / 2 for p in operands]
            result = result + sign * self._mapped(plane, absolute(weight), radii)
        constant = 0.0 if offset is None else offset
        if self.walk.outward:
            constant = constant + sign * self._slack(plane, weight, offset, operands)
        coefficients = jnp.broadcast_to(result, (self.d + 1, *jnp.shape(result[0] + constant)))
        return coefficients.at[-1].add(constant)

    def _mapped(self, plane: Planes, weight: Any, parts: Sequence[Array]) -> Array:
        """The linear part on each coefficient and on the constant."""
        return jax.vmap(functools.partial(plane.apply, weight))(*parts)

    def _slack(self, plane: Planes, weight: Any, offset: Any, operands: Sequence[_Pair]) -> Array:
        """How far rounding can move a function's values: each of its numbers errs by gamma times
        the sizes of what it is a sum of (Higham, section 3.1), and counts times its input entry."""
        largest = [jnp.sum(jnp.maximum(jnp.abs(p.lower), jnp.abs(p.upper)), 0) for p in operands]
        reach = jnp.max(self._reach, tuple(range(1, self._reach.ndim))) + 1
        sizes = [
            size * self.walk.net.spread(reach, x)
            for size, x in zip(largest, plane.operands, strict=True)
        ]
        n = sum(math.prod(x.shape) for x in plane.operands) + self.d + 16
        total = plane.apply(absolute(weight), *sizes) if sizes else jnp.zeros(())
        total = total if offset is None else total + jnp.abs(offset)
        return rounding.inflate(rounding.gamma(n) * total, n)

    def box(self, walk: Walk, v: Var) -> Box:
        """Bounds on a variable."""
        outer, inner = walk.net.outer_and_inner(v)

        def rows(a: Array) -> Array:  # (n, *v) to (outer x inner, b, n)
            a = a.reshape(-1, outer, walk.net.batch, inner)
            return a.transpose(1, 3, 2, 0).reshape(-1, walk.net.batch, a.shape[0])

        found = self.concretised(self.of(v), rows)
        return Box(*[entries(walk.net, end.T, v) for end in (found.lower, found.upper)])

    def concretised(self, pair: _Pair, rows: Callable[[Array], Array]) -> Box:
        """Bounds (b, s) on the functions, which `rows` brings into the order (s, b, d + 1)."""
        walk, shape = self.walk, self.walk.net.input.shape
        ends = []
        for sign, functions in ((1, pair.lower), (-1, pair.upper)):
            table = sign * rows(functions)
            values = least(walk.region, table[..., :-1].reshape(-1, *shape), walk.outward)
            ends.append(sign * (values + table[..., -1]).T)
        return with_dust(walk, Box(*ends), walk.dust[:, None])
