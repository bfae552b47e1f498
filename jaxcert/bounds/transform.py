"""What every bound transform shares: checking the set, tracing the model, float64 for proofs."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax

from jaxcert.bounds import rounding
from jaxcert.floats import ieee_float64
from jaxcert.graph import Graph, Var
from jaxcert.model import Model, as_float64, split, uses_float64
from jaxcert.rows import Rows
from jaxcert.sets import AnySet, Box, InputSet, checked, like, uncut
from jaxcert.specs import Spec
from jaxcert.tracing import trace_float64, trace_rows


class Bound(Protocol):
    """What a transform returns: a function from a set, and maybe a spec, to bounds."""

    def __call__(self, region: AnySet, spec: Spec | None = None) -> Box:
        """Bounds on C f(x) + d, or on f(x) without a spec, for x in the region."""
        ...


Method: TypeAlias = Callable[..., Bound]

Propagate: TypeAlias = Callable[[Graph, dict[Var, Rows], InputSet, Spec | None, bool], Any]
"""(graph, rows, region, spec, outward) -> a box, or something else that is passed on as it is."""


def transform(f: Model, outward: bool, propagate: Propagate) -> Bound:
    """The bound of a model by a propagation over its graph.

    A proof (`outward`) retraces the model in float64, computes there, and rounds the resulting
    boxes outward to the float type of the region. Linear inequalities of a set are left out.
    """
    mode = uses_float64()

    def bound(region: AnySet, spec: Spec | None = None) -> Box:
        region = uncut(checked(region))
        x = like(region)
        if not outward:
            return propagate(*trace_rows(f, x.shape, x.dtype), region, spec, False)
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        with jax.enable_x64(True):
            arrays, structure = split(f)
            arrays, region, spec = ieee_float64((arrays, region, spec))
            traced = trace_float64(structure, arrays, x.shape, dtype, mode)
            found = propagate(*traced, as_float64(region), as_float64(spec), True)
            return rounding.narrow(found, dtype) if isinstance(found, Box) else found

    return bound
