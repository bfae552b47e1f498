"""Interval bound propagation as a function transform.

`ibp(f)(region)` walks the graph of f and replaces every value by a box that contains it for all
inputs of the region (Gowal et al., "Scalable verified training for provably robust image
classification", ICCV 2019; Moore, Interval Analysis). Each equation is bounded tightly on its own;
looseness comes only from treating the operands of an equation as independent.
"""

from collections.abc import Callable
from typing import Any

from jaxcert.bounds import functions, products, rules  # noqa: F401  (they fill RULES)
from jaxcert.bounds.concretise import box_of
from jaxcert.bounds.interpreter import define, lower, output, upper
from jaxcert.bounds.last_layer import with_spec
from jaxcert.bounds.planes import PLANES
from jaxcert.bounds.transform import Bound, transform
from jaxcert.graph import Graph, Var
from jaxcert.model import Model
from jaxcert.rows import FOLLOW, Follow, Rows, same_axes
from jaxcert.sets import Box, InputSet
from jaxcert.specs import Spec


def ibp(f: Model, *, outward: bool = False) -> Bound:
    """Interval bounds of f: for every x in the region, lower <= C f(x) + d <= upper.

    Args:
      f: the model, (b, *input) -> (b, *out) with independent rows.
      outward: if False (for training and search) the bounds are those of exact arithmetic up to
        float rounding and are NOT a proof. If True the function is retraced in float64, every
        rounding error is counted (`rounding.py`) and the ends are rounded outward to the region's
        float type: a proof about f over the reals with its stored weights.

    Returns:
      A function `(region, spec=None) -> Box` of shape (b, *out), or (b, s) with a spec. The spec is
      folded into the last weight layer, which is tighter than bounding the logits first (Gowal
      et al., section 3). Pure: works under jit, vmap and grad. NaN means that nothing is known.

    Raises:
      UnsupportedEquation: an equation has no rule (see `register`).
      MixedRows: an example's output depends on other examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall
      >>> weights = jnp.array([[1.0, -1.0], [0.5, 2.0]])
      >>> box = ibp(lambda x: jnp.maximum(x @ weights, 0))(LinfBall(jnp.ones((1, 2)), 0.5))
      >>> print(box.lower, box.upper)
      [[0.75 0.  ]] [[2.25 2.5 ]]
    """

    return transform(f, outward, interval_bounds)


def register(
    primitive: str,
    rule: Callable[..., Any],
    follow: Follow = same_axes,
    planes: Callable[..., Any] | None = None,
) -> None:
    """Teach `ibp`, and with `planes` the linear methods, a primitive, or replace its rule.

    Args:
      primitive: its name as the error message gives it.
      rule: `(equation, values, outward) -> Box` (or a list of them for several outputs). A value is
        an array where it is exact and a `Box` otherwise; `equation.bind(*arrays)` evaluates the
        primitive, `equation.params` are its parameters. With `outward` the box must contain the
        exact result, rounding included (`rounding.widen`).
      follow: how the primitive moves the batch axis; the default is for elementwise ones.
      planes: `(equation, values, outward) -> [Planes]`, one for each output, affine functions below
        and above it on the boxes of its operands (`jaxcert.bounds.planes`);
        `jaxcert.bounds.planes.constant` takes the ends of the rule's box.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax.scipy.special import digamma
      >>> from jaxcert.bounds import rounding
      >>> def increasing_where_positive(equation, values, outward):
      ...     (x,) = values
      ...     box = Box(*equation.bind(x.lower), *equation.bind(x.upper))
      ...     box = rounding.widen(box, 64) if outward else box
      ...     return Box(jnp.where(x.lower > 0, box.lower, jnp.nan), box.upper)
      >>> register("digamma", increasing_where_positive)
      >>> box = ibp(digamma)(Box(jnp.ones((1, 1)), 2 * jnp.ones((1, 1))))
      >>> print(box.lower.round(3), box.upper.round(3))
      [[-0.577]] [[0.423]]
    """
    define(primitive, rule)
    FOLLOW[primitive] = follow
    if planes is not None:
        PLANES[primitive] = planes


def interval_bounds(
    graph: Graph, rows: dict[Var, Rows], region: InputSet, spec: Spec | None, outward: bool
) -> Box:
    """Interval bounds on the output of a graph, or on a spec's rows."""
    box = box_of(region, outward)
    if spec is not None:
        return with_spec(graph, rows, box, spec, outward)
    result = output(graph, [box], outward)
    return Box(lower(result), upper(result))
