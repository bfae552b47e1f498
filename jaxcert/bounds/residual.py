"""The rounding of linear bounds, folded into the planes that rows are pulled through.

A linear bound is a chain of inequalities C y >= sum_v A_v v + beta in which the stored floats A_v
stand for themselves. Pulling A through y = W x + t replaces A W by fl(A W), and

    A W x + A t  >=  fl(A W) x + fl(A t) - |A| (gamma (|W| |x| + |t|)),

because each entry of fl(A W) errs by at most gamma |A| |W|, and |x| is bounded by the box of x
(Higham, section 3.1). The error is |A| times a vector that does not depend on A: it is the same as
lowering t by that vector where A > 0 and raising it where A < 0. So a proof gives every equation,
affine or not, a `below` and an `above` that far apart, and the propagation itself need not know.
This residual form multiplies gamma by the actual sizes of activations and does not compound.

**Centred form.** Rows may be float32 while boxes, offsets and all sums over them are float64; gamma
is then 2^29 times larger. So that it meets small numbers, the rows speak of distances from points
c, one for each variable:

    y - c_y  =  W (x - c_x) + (W c_x + t - c_y).

Now gamma is multiplied by |x - c_x|, which shrinks with the region. The bracket is an offset,
computed in float64; c_y is the middle of the planes at c_x, so for affine equations it is nothing
but float64's own rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds import rounding
from jaxcert.bounds.planes import EXACT, ONE_TERM, Planes
from jaxcert.graph import Equation, Var
from jaxcert.sets import Array, Box


@dataclasses.dataclass(frozen=True)
class Operand:
    """What is known of an operand.

    Attributes:
      size: max |x|, or the largest distance from the centre.
      centre: None if rows speak of the operand itself.
    """

    size: Array
    centre: Array | None = None


@dataclasses.dataclass(frozen=True)
class Use:
    """How rows and offsets are summed up.

    Attributes:
      readers: by how many equations an operand is read at most, whose rows are added up.
      terms: how many numbers an offset is added up with.
      dtype: of the rows; weights are rounded to it as well.
    """

    readers: int
    terms: int
    dtype: Any = jnp.float64


def with_rounding(
    planes: Planes,
    eqn: Equation,
    operands: Sequence[Operand],
    use: Use,
    centre: Array | None = None,
) -> tuple[Planes, Array | None]:
    """Planes with the rounding of everything that rows gain when they are pulled through.

    Args:
      planes: valid in real arithmetic, of the equation.
      operands: all with a centre if the rows are float32, else none.
      centre: of the equation's result; by default a new one.

    Returns:
      The planes and that centre, or None if the rows are float64.
    """
    low = _side(planes, planes.lower, planes.below, eqn, operands, use)
    high = low
    if not planes.affine or planes.below is not planes.above:
        high = _side(planes, planes.upper, planes.above, eqn, operands, use)
    if use.dtype != jnp.float64:
        centre = _between(low.at_centre, high.at_centre, eqn) if centre is None else centre
        low, high = low.from_centre(centre), high.from_centre(centre)
    found = dataclasses.replace(
        planes,
        lower=low.weight,
        upper=low.weight if planes.affine else high.weight,
        below=_moved(low.offset, low.slack, -1),
        above=_moved(high.offset, high.slack, 1),
    )
    return found, centre


def _between(low: Any, high: Any, eqn: Equation) -> Array:
    centre = jnp.asarray(low / 2 + high / 2)
    return jnp.broadcast_to(jnp.where(jnp.isfinite(centre), centre, 0), eqn.outputs[0].shape)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two planes.

    Attributes:
      weight: in the rows' type.
      offset, slack: None for zero.
      at_centre: the plane's value at the operands' centres.
    """

    weight: Any
    offset: Array | None
    slack: Array | None
    at_centre: Any

    def from_centre(self, centre: Array) -> "_Side":
        """The plane between distances from centres. Three additions are rounded."""
        if self.offset is None and self.slack is None:  # entries only moved
            return self
        sizes = jnp.abs(self.at_centre) + jnp.abs(centre)
        slack = rounding.gamma(8) * sizes + (0.0 if self.slack is None else self.slack)
        return dataclasses.replace(self, offset=self.at_centre - centre, slack=slack)


def _side(
    planes: Planes,
    weight: Any,
    offset: Array | None,
    eqn: Equation,
    operands: Sequence[Operand],
    use: Use,
) -> _Side:
    n = products(eqn) + use.readers - 1
    own = n + sum(x.size.size for x in operands)  # sums in the slack itself, and in at_centre
    unit = rounding.unit(use.dtype)
    gamma = rounding.gamma(n + 1, unit)
    lost = 0.0 if use.dtype == jnp.float64 else 2.0**-100  # 2^-126 / unit, of weights made zero
    middle, error = _middle_and_error(weight)
    centres = [x.centre for x in operands if x.centre is not None]
    at_centre, parts = None, []
    errors = [gamma * x.size for x in operands] if n else []
    if use.dtype != jnp.float64:
        at_centre = planes.apply(middle, *centres) + (0.0 if offset is None else offset)
        if eqn.name not in EXACT:
            sizes = [rounding.gamma(own) * jnp.abs(c) for c in centres]
            errors = [a + b for a, b in zip(errors, sizes, strict=True)] if errors else sizes
    if errors:
        size = jax.tree.map(lambda w: jnp.abs(w) + lost, middle)
        parts.append(planes.apply(size, *errors))
    if error is not None:
        sizes = [x.size if x.centre is None else x.size + jnp.abs(x.centre) for x in operands]
        parts.append(planes.apply(error, *sizes) * (1 + gamma))
    if offset is not None:
        parts.append(rounding.gamma(use.terms) * jnp.abs(offset))
    slack = rounding.inflate(functools.reduce(jnp.add, parts), own) if parts else None
    narrow = jax.tree.map(lambda w: jnp.asarray(w).astype(use.dtype), middle)
    return _Side(_kept_apart(narrow, eqn), offset, slack, at_centre)


def _kept_apart(weight: Any, eqn: Equation) -> Any:
    """A weight that XLA does not multiply with another equation's before it meets the rows.

    It does so with constants, and what their product loses, to zero for one, would scale with the
    rows. Products of matrices it leaves in order, on a CPU.
    """
    matrix = eqn.name in ("dot_general", "conv_general_dilated")
    if not products(eqn) or (matrix and jax.default_backend() == "cpu"):
        return weight
    return jax.lax.optimization_barrier(weight)


def _moved(offset: Array | None, slack: Array | None, sign: int) -> Array | None:
    if slack is None:
        return offset
    return sign * slack if offset is None else offset + sign * slack


def products(eqn: Equation) -> int:
    """How many products or copies make up one entry of a pulled-back row, at most."""
    out = math.prod(eqn.outputs[0].shape)
    if eqn.name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"].rhs_spec
        return math.prod(eqn.inputs[1].shape) // eqn.inputs[1].shape[spec[1]]
    if eqn.name == "dot_general":
        places = [i for i, a in enumerate(eqn.inputs) if isinstance(a, Var) and a.bounded]
        if len(places) == 1:
            return _free(eqn, 1 - places[0])
        return 2 * max(_free(eqn, 0), _free(eqn, 1)) + 4  # two products of each, and masks
    if eqn.name in ("gather", "tile", "broadcast_in_dim", "cumsum"):
        return out + 4
    if eqn.name == "reduce_window_sum":
        return math.prod(eqn.params["window_dimensions"])
    return 0 if eqn.name in ONE_TERM else 4


def _free(eqn: Equation, place: int) -> int:
    """The entries of a dot's operand that one entry of the other operand meets."""
    (contracting, batch), shape = eqn.params["dimension_numbers"], eqn.inputs[place].shape
    fixed = {*contracting[place], *batch[place]}
    return math.prod(m for axis, m in enumerate(shape) if axis not in fixed)


def _middle_and_error(weight: Any) -> tuple[Any, Any]:
    """A weight that was itself rounded, as a float array and its largest deviation."""
    if not isinstance(weight, Box):
        return weight, None
    middle = weight.lower / 2 + weight.upper / 2
    error = jnp.maximum(weight.upper - middle, middle - weight.lower)
    return middle, rounding.inflate(error, 1)
